"""Caches and attention masks of a call. A cache is one of transformers' own, or of a class in the file of a model
(MiniMax). It can refuse any question. Transformers' own functions make the masks, outside the program.
"""

from __future__ import annotations

import functools
import sys
import typing
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_masks_for_generate


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


Masks = Tensor | None | dict[str, Tensor | None]


def make_masks(
    model: PreTrainedModel,
    *,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    attention_mask: Any,
    cache: Cache | None,
) -> Masks:
    """The masks of one call.

    Args:
        model: the model, with its own attention implementation in force.
        batch: sequences.
        tokens: query length of this step.
        dtype: dtype of the hidden states.
        device: where they are.
        attention_mask: what the caller gave: None, `[batch, kv_tokens]`, `[batch, 1, tokens, kv_tokens]`, or a dict.
        cache: the cache before this step.

    Returns:
        One mask, `[batch, 1, tokens, kv_tokens]` or None, or one for each layer type. Of a model whose cache holds
        states and no keys: what the caller gave.
    """
    if isinstance(attention_mask, dict):
        return attention_mask
    if takes_padding(model):
        return attention_mask
    arguments: dict[str, Any] = {
        "config": model.config,
        "inputs_embeds": torch.empty((batch, tokens, 0), dtype=dtype, device=device),
        "attention_mask": attention_mask,
        "past_key_values": cache,
        "position_ids": None,
    }
    make = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    try:
        masks: Masks = make(**arguments)
        if isinstance(masks, dict) and make is create_masks_for_generate:
            masks |= _renamed(arguments)
        return masks
    except AttributeError:
        if cache is not None or make is create_masks_for_generate:
            raise
        return create_masks_for_generate(**arguments)  # its own needs generate's cache
    except TypeError:
        # transformers 5.17 hands the maker of chunked masks an argument that it does not take.
        config = model.config.get_text_config()
        if "chunked_attention" not in getattr(config, "layer_types", ()):
            raise
        arguments["config"] = config
        return {kind: LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind](**arguments) for kind in set(config.layer_types)}


def _renamed(arguments: dict[str, Any]) -> dict[str, Tensor | None]:
    """Masks of layers that need several, made as their names say: transformers 5.23 makes the sliding one of those
    layers without a window, unlike the models."""
    config = arguments["config"].get_text_config()
    functions = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
    several = [
        functions[kind] for kind in set(getattr(config, "layer_types", ())) if isinstance(functions.get(kind), dict)
    ]
    wrong = {
        name for masks in several for name, function in masks.items() if functions.get(name, function) is not function
    }
    return {name: functions[name](**{**arguments, "config": config}) for name in wrong}


def mask_sources(masks: Masks) -> dict[str, str | None]:
    """Source in the captured graph -> key of the mask; a single mask has key None."""
    if isinstance(masks, dict):
        return {f"L['masks']['{key}']": key for key in masks}
    return {"L['masks']": None}


def mask_at(masks: Masks, key: str | None) -> Tensor | None:
    """The mask of a key; a single mask has none."""
    return masks[key] if isinstance(masks, dict) and key is not None else masks  # type: ignore[return-value]


def stand_ins(
    model: nn.Module, masks: Masks, batch: int, tokens: int, device: torch.device
) -> Tensor | dict[str, Tensor]:
    """Masks for a capture: of the right structure, distinct objects, never computed with."""
    raw = takes_padding(model)

    def one() -> Tensor:
        sizes = (batch, tokens) if raw else (batch, 1, tokens, tokens)
        return torch.ones(sizes, dtype=torch.bool, device=device)

    return {key: one() for key in masks} if isinstance(masks, dict) else one()


_TAKE_PADDING: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def takes_padding(model: nn.Module) -> bool:
    """Whether a model's cache holds states and no keys, so that its layers take the mask that says what is padding."""
    if model not in _TAKE_PADDING:
        _TAKE_PADDING[model] = seen_tokens(new_cache(model)) is None
    return _TAKE_PADDING[model]
