"""Reads a call of a causal language model's forward: refuses what no program computes, and fills in defaults."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from glowplug.frontends.hf.caches import Masks, has_begun, make_masks, new_cache

_TAKEN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "cache_params"}
_TAKEN |= {"cache_position", "logits_to_keep", "return_dict", "use_cache"}
_MUST_BE_OFF = {"output_hidden_states", "output_attentions", "output_router_logits"}


@dataclass(frozen=True)
class Signature:
    """Calls that differ in their signature need different programs.

    Attributes:
        embeds: whether the input is `inputs_embeds`.
        dtype: the dtype of the input.
        position_lead: the sizes of `position_ids` before `[batch, tokens]`: `()`, or `(3,)` for multi-axis rope.
        masks: the keys of the masks; None for a single one.
        keeps: whether the forward takes `logits_to_keep`.
        device: where the inputs are.
    """

    embeds: bool
    dtype: torch.dtype
    position_lead: tuple[int, ...]
    masks: tuple[str, ...] | None
    keeps: bool
    device: torch.device


@dataclass(slots=True)
class HfCall:
    """A call, read.

    Attributes:
        signature: identifies the program.
        inputs: `[batch, tokens]` token ids or `[batch, tokens, hidden]` embeddings.
        position_ids: `[..., batch, tokens]`; None if the call leaves them to the model.
        padding: the caller's attention mask.
        masks: one mask, or one for each layer type.
        keep: the positions whose logits are wanted, `[kept]`; None if the forward does not take `logits_to_keep`.
        cache: the cache to write to; None if there is none.
        return_tuple: whether the caller wants a tuple.
    """

    signature: Signature
    inputs: Tensor
    position_ids: Tensor | None
    padding: Any
    masks: Masks
    keep: Tensor | None
    cache: Cache | None
    return_tuple: bool

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return self.inputs.device

    @property
    def has_begun(self) -> bool:
        """Whether the call continues a sequence."""
        return has_begun(self.cache, self.inputs.shape[1])


def first_call(model: PreTrainedModel) -> HfCall | str:
    """The first call that `generate` makes with token ids, or the reason why no program can serve it."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    prepare: Any = getattr(model, "_prepare_position_ids_for_generation", None)
    positions = prepare(ids, {}) if prepare is not None else torch.arange(2, device=ids.device).unsqueeze(0)
    return read_call(model, (), {"input_ids": ids, "position_ids": positions, "use_cache": True})


def read_call(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HfCall | str:
    """Read a call. Returns the reason as a string if no program can serve it."""
    names = forward_parameters(type(model))  # type: ignore[arg-type]
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    for name, value in arguments.items():
        if name in _TAKEN or value is None or (isinstance(value, dict) and not value):
            continue
        if name in _MUST_BE_OFF:
            if value:
                return f"{name}=True asks for values that the compiled program does not keep"
        elif name == "labels":
            return "labels were given, and the compiled program computes no loss"
        else:
            return f"the argument {name!r} is not one that the compiled program takes"
    for name in _MUST_BE_OFF:
        if arguments.get(name) is None and getattr(model.config.get_text_config(), name, False):
            return f"the config sets {name}=True, which asks for values that the compiled program does not keep"
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        return "exactly one of input_ids and inputs_embeds must be given"
    inputs = ids if embeds is None else embeds
    if not isinstance(inputs, Tensor) or inputs.dim() != (2 if embeds is None else 3) or inputs.shape[1] == 0:
        return "the input is not a batch of one or more tokens"
    batch, tokens = inputs.shape[:2]
    cache = _cache(model, arguments)
    if isinstance(cache, str):
        return cache
    position_ids = _positions(model, arguments, inputs, cache)
    if isinstance(position_ids, str):
        return position_ids
    keep = _keep(names, arguments, tokens, inputs.device)
    if isinstance(keep, str):
        return keep
    try:
        masks = make_masks(
            model,
            batch=batch,
            tokens=tokens,
            dtype=model.dtype if embeds is None else embeds.dtype,
            device=inputs.device,
            attention_mask=arguments.get("attention_mask"),
            cache=cache,
        )
    except Exception as exc:  # the model's own forward may still know how to use this cache or mask
        return f"transformers makes no masks for this call ({type(exc).__name__}: {str(exc)[:200]})"
    if not _masks_usable(masks):
        return f"masks of type {type(masks).__name__} can't be handed to the compiled program"
    if isinstance(masks, dict):  # transformers makes them in the order of a set, which differs between processes
        masks = dict(sorted(masks.items()))
    signature = Signature(
        embeds=embeds is not None,
        dtype=inputs.dtype,
        position_lead=tuple(position_ids.shape[:-2]) if position_ids is not None else (),
        masks=tuple(masks) if isinstance(masks, dict) else None,
        keeps=keep is not None,
        device=inputs.device,
    )
    # Compiled pieces rely on the strides of the trace.
    inputs = inputs.contiguous()
    position_ids = position_ids.contiguous() if position_ids is not None else None
    keep = keep.contiguous() if keep is not None else None
    padding, return_tuple = arguments.get("attention_mask"), arguments.get("return_dict") is False
    return HfCall(signature, inputs, position_ids, padding, masks, keep, cache, return_tuple)


def _masks_usable(masks: Any) -> bool:
    values = masks.values() if isinstance(masks, dict) else [masks]
    return all(mask is None or (isinstance(mask, Tensor) and mask.dim() in (2, 4)) for mask in values)


def cache_argument(model: nn.Module) -> str:
    """The name by which a model's forward takes and returns its cache; state-space models have a name of their own."""
    names = forward_parameters(type(model))  # type: ignore[arg-type]
    return "cache_params" if "cache_params" in names and "past_key_values" not in names else "past_key_values"


def output_type(model: PreTrainedModel) -> type:
    """The class of the model's output, by the annotation of its forward."""
    forward = inspect.unwrap(type(model).forward)
    try:
        annotation = get_type_hints(forward).get("return")
    except (NameError, TypeError):
        annotation = None
    for candidate in getattr(annotation, "__args__", (annotation,)):
        if isinstance(candidate, type) and issubclass(candidate, ModelOutput):
            return candidate
    return CausalLMOutputWithPast


def _cache(model: PreTrainedModel, arguments: dict[str, Any]) -> Cache | str | None:
    name = cache_argument(model)
    other = ({"cache_params", "past_key_values"} - {name}).pop()
    if arguments.get(other) is not None:
        return f"the argument {other!r} is not one that the compiled program takes"
    cache, use_cache = arguments.get(name), arguments.get("use_cache")
    if use_cache is None:
        use_cache = getattr(model.config.get_text_config(), "use_cache", False)
    if cache is None:
        return new_cache(model) if use_cache else None
    if not isinstance(cache, Cache):
        return f"a cache of type {type(cache).__name__} is not a transformers Cache"
    return cache if use_cache else "a cache was given with use_cache=False, which each model takes in its own way"


def _positions(
    model: PreTrainedModel, arguments: dict[str, Any], inputs: Tensor, cache: Cache | None
) -> Tensor | str | None:
    position_ids = arguments.get("position_ids")
    batch, tokens = inputs.shape[:2]
    if position_ids is None:
        prepare = "_prepare_position_ids_for_generation"
        if getattr(type(model), prepare, None) is not getattr(GenerationMixin, prepare, None):
            return "this model works out position_ids of its own; pass position_ids, or call generate()"
        return None
    if not _are_indices(position_ids) or position_ids.dim() < 2 or position_ids.shape[-1] != tokens:
        return "position_ids must be integers, and one for each token of each sequence"
    unmasked = cache is None and arguments.get("attention_mask") is None
    if unmasked and not (position_ids.diff(dim=-1) == 1).all():
        return "packed position_ids without a cache or an attention mask"
    position_ids = position_ids.to(inputs.device, torch.long)
    if position_ids.shape[-2] != batch:
        position_ids = position_ids.expand(*position_ids.shape[:-2], batch, tokens)
    return position_ids


def _are_indices(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype is not torch.bool
        and not (value.is_floating_point() or value.is_complex())
    )


def _keep(names: tuple[str, ...], arguments: dict[str, Any], tokens: int, device: torch.device) -> Tensor | str | None:
    if "logits_to_keep" not in names:
        return None
    keep = arguments.get("logits_to_keep")
    if isinstance(keep, Tensor):
        if keep.dim() != 1 or not _are_indices(keep):
            return "logits_to_keep must be an integer or a tensor of integers of one dimension"
        return keep.to(device, torch.long)
    keep = int(keep or 0)
    if keep < 0:
        return "a negative logits_to_keep"
    first = 0 if keep == 0 else max(tokens - keep, 0)
    return torch.arange(first, tokens, device=device)


@functools.lru_cache(maxsize=256)
def forward_parameters(cls: type) -> tuple[str, ...]:
    """The parameters of a model class's forward by name, in order, without `self`, `args` and `kwargs`."""
    names = list(inspect.signature(cls.forward).parameters)  # type: ignore[attr-defined]
    return tuple(name for name in names[1:] if name not in ("kwargs", "args"))
