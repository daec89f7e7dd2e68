"""Well-known models as configurations with random weights: the true depth and pattern of layers, as these make a cold
start slow; at either of two widths."""

from glowplug.bench.presets.build import Width, build_config, build_model, check_depth, get_preset
from glowplug.bench.presets.catalogue import PRESETS, Preset

__all__ = ["PRESETS", "Preset", "Width", "build_config", "build_model", "check_depth", "get_preset"]
