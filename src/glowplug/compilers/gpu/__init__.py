"""Compilation for GPUs: in forks, of glowplug's own kernels too, and what it takes before and after."""
