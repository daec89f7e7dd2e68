"""The front end of vLLM: a plug-in that compiles vLLM's decoders from a stamped template.

vLLM's own engine, passes and CUDA graphs stay in charge. Only the compilation of a decoder is replaced, and only where
the result is proved equal to the decoder's own forward; see `glowplug.frontends.vllm.plugin`.
"""
