"""A model that attends within a short window, for the comparison with eager: masks are made outside of the program, and
a short text would not show that the model's own differ from them only beyond its window."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

WINDOW = 4
"""Shorter than the comparison's text."""
_NAMES = ("sliding_window", "attention_chunk_size")


def with_short_windows(model: PreTrainedModel) -> PreTrainedModel | None:
    """A model that shares every layer and weight with `model`, which stays as it is, but makes its masks and caches for
    a window of `WINDOW` tokens, as its config says. None when it has no longer one."""
    twin: Any = _twin(model) if _has_windows(model.config) else None
    return twin


def _twin(module: nn.Module) -> nn.Module:
    """Copies of the models inside each other, down to their layers; each has a table of children of its own."""
    if not isinstance(module, PreTrainedModel):
        return module
    made: nn.Module = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    made.__dict__["config"] = _shortened(module.config)
    made.__dict__["_modules"] = {name: _twin(child) for name, child in module._modules.items() if child is not None}
    return made


def _has_windows(config: Any) -> bool:
    long = (isinstance(getattr(config, name, None), int) and getattr(config, name) > WINDOW for name in _NAMES)
    return any(long) or any(map(_has_windows, _parts(config).values()))


def _shortened(config: Any) -> Any:
    made = copy.copy(config)
    for name in _NAMES:
        if isinstance(getattr(made, name, None), int) and getattr(made, name) > WINDOW:
            setattr(made, name, WINDOW)
    for name, part in _parts(config).items():
        setattr(made, name, _shortened(part))
    return made


def _parts(config: Any) -> dict[str, Any]:
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    return {name: part for name, part in parts.items() if part is not None}
