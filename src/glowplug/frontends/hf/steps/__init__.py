"""Steps of one token: how CUDA graphs record them, and how they attend on a GPU."""
