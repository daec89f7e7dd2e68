"""Plain modules: any `nn.Module` whose forward takes and returns tensors, with layer ops or without."""
