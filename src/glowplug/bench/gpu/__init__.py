"""What people on GPUs care for: the tokens of `generate` over a static cache, and the kernels behind them."""

from glowplug.bench.gpu.figures import add_figures, start

__all__ = ["add_figures", "start"]
