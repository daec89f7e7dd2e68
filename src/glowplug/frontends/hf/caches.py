"""Caches and attention masks of a call. A cache is of a class of transformers, or of a class that the model's file
defines (MiniMax); any of its methods may raise. Transformers' functions make the masks, outside the program.
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
    """An empty cache, as the model's forward makes one if it gets none."""
    own = own_cache_class(model)
    return own() if own is not None else DynamicCache(config=model.config.get_text_config())


def own_cache_class(model: nn.Module) -> type[Cache] | None:
    """The cache class that a model defines in its own file and requires, as the annotation of its forward says."""
    classes = {type(module) for module in model.modules() if isinstance(module, PreTrainedModel)}
    annotated = [_annotated_cache(cls) for cls in sorted(classes, key=lambda cls: cls.__qualname__)]  # type: ignore[arg-type]
    return next((own for own in annotated if own is not None), None)


@functools.lru_cache(maxsize=256)
def _annotated_cache(cls: Any) -> type[Cache] | None:
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
    """How many tokens a cache holds, for some classes as a tensor. None if the cache can't say: one that keeps states
    instead of keys and values raises."""
    if cache is None:
        return 0
    try:
        return cache.get_seq_length()
    except Exception:
        return None


def has_begun(cache: Cache | None, tokens: int) -> bool:
    """Whether a call of so many tokens continues what a cache holds; False if it can't say. A cache may count its
    tokens on the GPU, which a single token does not wait for: only a cache that was emptied could get it anew."""
    if cache is None:
        return False
    seen = seen_tokens(cache)
    if isinstance(seen, Tensor) and tokens == 1:
        return True
    try:
        return bool(cache.has_previous_state()) if seen is None else int(seen) > 0
    except Exception:
        return False


def mask_extent(cache: Cache | None, tokens: int) -> int | None:
    """How many tokens each layer attends to in a step of `tokens`: all cached tokens and the step's own. None if layers
    differ, attend to a window, or the cache can't say."""
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
    """The masks of one call: a single mask, `[batch, 1, tokens, kv_tokens]` or None, or one for each layer type.

    Args:
        model: the model, with its own attention implementation in force.
        batch: the number of sequences.
        tokens: the query length of this step.
        dtype: the dtype of the hidden states.
        device: where they are.
        attention_mask: the caller's: None, `[batch, kv_tokens]`, `[batch, 1, tokens, kv_tokens]`, or a dict. A dict is
            returned as it is, and so is any mask if the model's cache holds states instead of keys.
        cache: the cache before this step.
    """
    if isinstance(attention_mask, dict) or takes_padding(model):
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
            masks |= _corrected(arguments)
        return masks
    except AttributeError:
        if cache is not None or make is create_masks_for_generate:
            raise
        return create_masks_for_generate(**arguments)  # the model's own maker needs a cache
    except TypeError:
        # transformers 5.17 passes the maker of chunked masks an argument that it does not take.
        config = model.config.get_text_config()
        if "chunked_attention" not in getattr(config, "layer_types", ()):
            raise
        arguments["config"] = config
        return {type_: LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[type_](**arguments) for type_ in set(config.layer_types)}


def _corrected(arguments: dict[str, Any]) -> dict[str, Tensor | None]:
    """Corrected masks of layers that take several: transformers 5.23 makes their sliding mask without a window, unlike
    the models, so each is made by the function of its name."""
    config = arguments["config"].get_text_config()
    functions = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
    by_type = [functions.get(layer_type) for layer_type in set(getattr(config, "layer_types", ()))]
    several = [masks for masks in by_type if isinstance(masks, dict)]
    wrong = {
        name for masks in several for name, function in masks.items() if functions.get(name, function) is not function
    }
    return {name: functions[name](**{**arguments, "config": config}) for name in wrong}


def mask_sources(masks: Masks) -> dict[str, str | None]:
    """Source in the captured graph -> key of the mask; the key of a single mask is None."""
    if isinstance(masks, dict):
        return {f"L['masks']['{key}']": key for key in masks}
    return {"L['masks']": None}


def mask_at(masks: Masks, key: str | None) -> Tensor | None:
    """The mask of a key; the single mask if the key is None."""
    return masks[key] if isinstance(masks, dict) and key is not None else masks  # type: ignore[return-value]


def stand_ins(
    model: nn.Module, masks: Masks, batch: int, tokens: int, device: torch.device
) -> Tensor | dict[str, Tensor]:
    """Masks for a capture: distinct tensors in the right structure, which nothing computes with."""
    sizes = (batch, tokens) if takes_padding(model) else (batch, 1, tokens, tokens)

    def one() -> Tensor:
        return torch.ones(sizes, dtype=torch.bool, device=device)

    return {key: one() for key in masks} if isinstance(masks, dict) else one()


_TAKE_PADDING: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def takes_padding(model: nn.Module) -> bool:
    """Whether the layers take the padding mask itself, because the model's cache holds states instead of keys."""
    if model not in _TAKE_PADDING:
        _TAKE_PADDING[model] = seen_tokens(new_cache(model)) is None
    return _TAKE_PADDING[model]
