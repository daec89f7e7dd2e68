"""glowplug for transformers: any decoder-only causal language model, through transformers' official interfaces."""
