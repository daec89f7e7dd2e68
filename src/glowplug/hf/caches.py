"""Caches for a model: transformers' own, or the one of a class that the model's file defines for it (MiniMax)."""

from __future__ import annotations

import functools
import sys
import typing
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache


def new_cache(model: PreTrainedModel) -> Cache:
    """An empty cache, of the class that the model's forward makes when it is given none."""
    own = own_cache_class(model)
    return own() if own is not None else DynamicCache(config=model.config.get_text_config())


def own_cache_class(model: nn.Module) -> type[Cache] | None:
    """The class of cache that a model takes no other than: defined in its own file, and named by its forward."""
    classes = {type(module) for module in model.modules() if isinstance(module, PreTrainedModel)}
    found = [_named_by(cls) for cls in sorted(classes, key=lambda cls: cls.__qualname__)]  # type: ignore[arg-type]
    return next((own for own in found if own is not None), None)


@functools.lru_cache(maxsize=256)
def _named_by(cls: Any) -> type[Cache] | None:
    try:
        hints = typing.get_type_hints(cls.forward, vars(sys.modules[cls.__module__]))
    except (NameError, TypeError):
        return None
    hint = hints.get("past_key_values")
    for choice in (hint, *typing.get_args(hint)):
        if isinstance(choice, type) and issubclass(choice, Cache) and choice.__module__ == cls.__module__:
            return choice
    return None
