"""Turns a transformers model's forward into a function of tensors, and reads a program's arguments from a call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glowplug.errors import CaptureError
from glowplug.front import Rung, Target
from glowplug.frontends.hf import patch
from glowplug.frontends.hf.caches import mask_at, mask_extent, mask_sources, seen_tokens, stand_ins, takes_padding
from glowplug.frontends.hf.calls import HfCall, cache_argument
from glowplug.frontends.hf.discover import ExpertsPlan, attention_layers, give_attention_functions
from glowplug.frontends.hf.positions import Positions
from glowplug.graph.capture import Captured
from glowplug.graph.sources import named, size_of
from glowplug.graph.split import OpStep, Piece, Step
from glowplug.graph.stamp import reads
from glowplug.ops.attention import layer_index

CUT, WHOLE, OWN_MASKS = WAYS = ("cut", "whole", "own masks")
"""How a trace sees attention: cut out of its modules, as whole modules, or as whole modules with masks that the model
makes inside the trace from the padding mask."""

_BATCH, _TOKENS, _KEPT, _EXTENT, _PAST_TOKENS = 2, 8, 5, 11, 3
"""Sizes of the capture: all at least 2, and all different, so that Dynamo does not equate them."""

_MASK_AT = {"glowplug::attention": 4, "glowplug::mixer": 2, "glowplug::mixer_handing_on": 2}
"""The position of an op's mask among its arguments."""
_HANDING_ON = "glowplug::mixer_handing_on"
_MIXERS = frozenset({"glowplug::mixer", _HANDING_ON})

INPUTS, POSITIONS, KEEP = "L['inputs']", "L['position_ids']", "L['keep']"
PADDING = "L['cache'].padding"
"""The source of the padding mask from which a model makes its masks inside the trace."""
_PAST = "L['cache'].past"
_VARYING = frozenset({INPUTS, POSITIONS, KEEP, PADDING})
"""The sources of the tensors whose sizes vary from call to call, except masks."""


def target(model: nn.Module, call: HfCall, rung: Rung, plan: ExpertsPlan) -> Target:
    """What to trace.

    Args:
        model: the model, or a short model of its template.
        call: a call for which the program is made.
        rung: how the trace sees attention.
        plan: how the trace treats the experts.

    Raises:
        CaptureError: the model can't be traced for this call.
    """
    own_masks = rung.way == OWN_MASKS
    if rung.way == CUT:
        give_attention_functions(model)
    shadow = patch.Shadow(model)
    patch.put_in_force(shadow, plan, whole=rung.way != CUT)
    layers: dict[int, Any] = {layer_index(layer): layer for layer in attention_layers(shadow.root).values()}  # type: ignore[misc]
    masks = set() if own_masks else set(mask_sources(call.masks))
    function, examples = _example(shadow.root, call, layers, own_masks=own_masks)
    return Target(
        function,
        examples,
        is_argument=lambda source: source in _VARYING or source in masks or _is_size(source),
        varying=_VARYING,
        check=lambda steps, captured: _check(steps, captured, None if own_masks else masks),
        is_unread=lambda source: source.startswith("L['cache']") and source != PADDING,
    )


def masks_of(call: HfCall) -> dict[str, Tensor]:
    """Source in a trace -> mask, for those masks of a call that are not None."""
    pairs = ((source, mask_at(call.masks, key)) for source, key in mask_sources(call.masks).items())
    return {source: mask for source, mask in pairs if mask is not None}


def _is_size(source: str) -> bool:
    """Whether a source is a size that a call determines."""
    size = size_of(source)
    return size is not None and size[0] in {*_VARYING, _PAST}


def _example(
    model: nn.Module, call: HfCall, layers: dict[int, nn.Module], *, own_masks: bool
) -> tuple[Any, tuple[Any, ...]]:
    """The function to trace, and its example arguments."""
    signature, device = call.signature, call.inputs.device
    tail = (call.inputs.shape[-1],) if signature.embeds else ()
    inputs = torch.zeros(_BATCH, _TOKENS, *tail, dtype=signature.dtype, device=device)
    torch._dynamo.mark_dynamic(inputs, (0, 1))
    lead = signature.position_lead
    positions = torch.arange(_TOKENS, device=device).expand(*lead, _BATCH, _TOKENS).contiguous()
    torch._dynamo.mark_dynamic(positions, (len(lead), len(lead) + 1))
    keep = torch.arange(_KEPT, device=device) if signature.keeps else None
    extent, past = torch.empty(_EXTENT, device=device), torch.empty(_PAST_TOKENS, device=device)
    for tensor in (extent, past, keep):
        if tensor is not None:
            torch._dynamo.mark_dynamic(tensor, 0)
    states, padding = takes_padding(model), None
    if own_masks:
        padding = torch.ones(_BATCH, _TOKENS if states else _EXTENT, dtype=torch.long, device=device)
        torch._dynamo.mark_dynamic(padding, (0, 1))
    cache = patch.capture_cache_class(model)(layers, extent, past, padding)
    masks = None if own_masks else stand_ins(model, call.masks, _BATCH, _TOKENS, device)
    names = ("inputs_embeds" if signature.embeds else "input_ids", cache_argument(model), states)
    return _forward, (model, inputs, positions, masks, cache, keep, names)


def _forward(
    model: Any, inputs: Tensor, position_ids: Tensor, masks: Any, cache: Any, keep: Any, names: tuple[str, str, bool]
) -> Tensor:
    arguments = {names[0]: inputs, names[1]: cache, "position_ids": position_ids, "use_cache": True}
    arguments["attention_mask"] = cache.padding if masks is None else masks
    if masks is None and names[2]:  # a mask over states does not cover earlier tokens
        torch._check(cache.padding.shape[1] == inputs.shape[1])
    if keep is not None:
        arguments["logits_to_keep"] = keep
    return type(model).forward(model, **arguments).logits


def _check(steps: Sequence[Step], captured: Captured, masks: Collection[str] | None) -> None:
    """Refuse a model whose pieces compute with masks, because a program passes masks of any shape on to attention, or
    with what attention passes from layer to layer. `masks` are the sources of masks; None if the trace makes them."""
    output = next(node for node in reversed(captured.gm.graph.nodes) if node.op == "output")
    if len(output.args[0]) != 1:
        raise CaptureError("the model's forward keeps tensors outside of its output, which a program would not do")
    passed_on = {step.outputs[1] for step in steps if isinstance(step, OpStep) and step.op.name == _HANDING_ON}
    for step in steps:
        if not (isinstance(step, OpStep) and step.op.name in _MIXERS) and passed_on & set(reads(step)):
            raise CaptureError("the model computes with what its attention hands on from layer to layer")
    mask_nodes = {entry.node for entry in captured.inputs if masks and entry.source in masks}
    sizes = {e.node: e.source for e in captured.inputs if e.type == "symint" and not _is_size(e.source)}
    for step in steps:
        if isinstance(step, Piece):
            used = bool(mask_nodes & set(step.inputs))
            for name in sizes.keys() & set(step.inputs):
                raise CaptureError(f"a piece depends on a size that no tensor of it has: {named(sizes[name])}")
        else:
            mask = step.args[_MASK_AT[step.op.name]] if step.op.name in _MASK_AT else None
            used = masks is not None and mask is not None and getattr(mask, "name", None) not in mask_nodes
        if used:
            raise CaptureError("the model computes with its attention mask inside its layers")


# -- the arguments of a program ----------------------------------------------------------------------------------


def fill_in(model: nn.Module, positions: Positions, arguments: Sequence[str], call: HfCall) -> str | None:
    """Compute the arguments that the call leaves out. Returns the reason if that fails."""
    if call.position_ids is None and _any_of(arguments, POSITIONS):
        filled = positions.fill(call)
        if isinstance(filled, str):
            return filled
        call.position_ids = filled
    if _any_of(arguments, PADDING):
        return _make_padding(call, takes_padding(model))
    if _any_of(arguments, _PAST) and seen_tokens(call.cache) is None:
        return "the cache can't say how many tokens it holds"
    return None


def shapes(arguments: Sequence[str], call: HfCall) -> dict[str, tuple[int, ...]]:
    """Source -> shape of each tensor of a call."""
    sizes = {INPUTS: tuple(call.inputs.shape), POSITIONS: (*call.signature.position_lead, *call.inputs.shape[:2])}
    if call.keep is not None:
        sizes[KEEP] = tuple(call.keep.shape)
    if _any_of(arguments, PADDING):
        sizes[PADDING] = tuple(call.padding.shape)
    return sizes


def _any_of(arguments: Sequence[str], source: str) -> bool:
    return any(argument.startswith(source) for argument in arguments)


def _make_padding(call: HfCall, states: bool) -> str | None:
    """Complete the call's padding mask, `[batch, kv_tokens]`. Returns the reason if that fails. If the cache holds
    `states` instead of keys, the mask covers only the step's tokens, and a single token is never padding."""
    batch, tokens = call.inputs.shape[:2]
    mask = call.padding
    extent = tokens if states else mask_extent(call.cache, tokens)
    if extent is None:
        return "the model makes its own masks, and the cache's layers don't all keep every token"
    if states and isinstance(mask, Tensor):
        mask = mask[:, -tokens:] if tokens > 1 else None
    if mask is None:
        mask = torch.ones((batch, extent), dtype=torch.long, device=call.inputs.device)
    elif not isinstance(mask, Tensor) or mask.dtype.is_floating_point or tuple(mask.shape) != (batch, extent):
        return f"the model makes its own masks, of a mask of integers of [{batch}, {extent}], and was given another"
    call.padding = mask.to(call.inputs.device, torch.long).contiguous()
    return None


def read_inputs(arguments: Sequence[str], call: HfCall) -> list[Any]:
    """The value of each source in a call."""
    return [_READERS[source](call) if source in _READERS else _read_other(source, call) for source in arguments]


_READERS: dict[str, Any] = {
    INPUTS: lambda call: call.inputs,
    POSITIONS: lambda call: call.position_ids,
    KEEP: lambda call: call.keep,
    PADDING: lambda call: call.padding,
}


def _read_other(source: str, call: HfCall) -> Any:
    size = size_of(source)
    if size is not None:
        return int(seen_tokens(call.cache) or 0) if size[0] == _PAST else _READERS[size[0]](call).shape[size[1]]
    for name, key in mask_sources(call.masks).items():
        if name == source:
            return mask_at(call.masks, key)
    raise KeyError(source)
