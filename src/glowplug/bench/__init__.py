"""Measures how fast models start: presets of real models, one strategy a process, a grid of them, tables and plots."""
