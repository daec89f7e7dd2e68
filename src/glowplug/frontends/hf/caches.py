"""Caches for a model: transformers' own, or the one of a class that the model's file defines for it (MiniMax). And all
that is asked of a cache: any of it can be refused."""

from __future__ import annotations

import functools
import sys
import typing
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache


def new_cache(model: Any) -> Cache:
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


def seen_tokens(cache: Cache | None) -> int | Tensor | None:
    """How many tokens a cache holds; a tensor where that is one. None when the cache can't say: one that keeps states
    in the place of keys and values refuses the question, and so may any class of cache."""
    if cache is None:
        return 0
    try:
        return cache.get_seq_length()
    except Exception:
        return None


def has_begun(cache: Cache | None) -> bool:
    """Whether a cache holds tokens already; of a cache that can't say, no."""
    if cache is None:
        return False
    seen = seen_tokens(cache)
    try:
        return bool(cache.has_previous_state()) if seen is None else int(seen) > 0
    except Exception:
        return False


def mask_extent(cache: Cache | None, tokens: int) -> int | None:
    """How many tokens each layer attends to in a step of `tokens`, where that is all that a cache holds and the step's
    own; None where layers differ, see a window, or the cache can't say."""
    if cache is None:
        return tokens
    try:
        sizes = {cache.get_mask_sizes(tokens, index) for index in range(max(len(cache.layers), 1))}
    except Exception:
        return None
    ((extent, offset),) = sizes if len(sizes) == 1 else ((-1, -1),)
    return extent if offset == 0 else None
