"""Traces a transformers model: its forward as a function of tensors, with example inputs, and the program of that."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from glowplug.errors import CaptureError
from glowplug.graph.capture import Captured, capture, traced_files
from glowplug.graph.shapes import ShapeAssumptions, read_assumptions
from glowplug.graph.split import OpStep, Piece, Step
from glowplug.graph.stamp import reads
from glowplug.hf import interfaces
from glowplug.hf.call import Call, Signature, cache_argument
from glowplug.hf.experts import ExpertsPlan
from glowplug.hf.kinds import Slots, read_slots
from glowplug.hf.masks import mask_sources, stand_ins, takes_padding
from glowplug.hf.positions import Positions
from glowplug.hf.served import PADDING, SIZE, Recipe, Served
from glowplug.hf.shadow import Shadow
from glowplug.hf.verify import output_type
from glowplug.layers.registry import LayerRegistry
from glowplug.ops.attention import layer_index
from glowplug.program import Built
from glowplug.program import template as templates
from glowplug.program.template import Template
from glowplug.reasons import named
from glowplug.report import Report

_BATCH, _TOKENS, _KEPT, _EXTENT, _PAST = 2, 8, 5, 11, 3
"""Sizes of the capture: at least 2 and all different, so that none is taken for another."""

_MASK_AT = {"glowplug::attention": 4, "glowplug::mixer": 2, "glowplug::mixer_handing_on": 2}
"""Which argument of an op is the mask."""
_HANDING_ON = "glowplug::mixer_handing_on"
_MIXERS = frozenset({"glowplug::mixer", _HANDING_ON})

VARYING = frozenset({"L['inputs']", "L['position_ids']", "L['keep']", PADDING})
"""Sources of the tensors that change from call to call, besides masks."""


def example(
    model: nn.Module, call: Call, layers: dict[int, nn.Module], *, own_masks: bool = False
) -> tuple[Any, tuple[Any, ...]]:
    """The function to trace and its example arguments.

    Args:
        model: the model, or a short model of its template.
        call: a call that the program is to serve.
        layers: layer index -> attention module.
        own_masks: whether the model makes its masks inside the trace, of one that says what is padding.

    Raises:
        CaptureError: no function fits the call.
    """
    signature, device = call.signature, call.inputs.device
    inputs = _inputs(signature, call, device)
    lead = signature.position_lead
    positions = torch.arange(_TOKENS, device=device).expand(*lead, _BATCH, _TOKENS).contiguous()
    torch._dynamo.mark_dynamic(positions, len(lead))
    torch._dynamo.mark_dynamic(positions, len(lead) + 1)
    keep = torch.arange(_KEPT, device=device) if signature.keeps else None
    extent, past = torch.empty(_EXTENT, device=device), torch.empty(_PAST, device=device)
    for tensor in (extent, past, *((keep,) if keep is not None else ())):
        torch._dynamo.mark_dynamic(tensor, 0)
    states, padding = takes_padding(model), None
    if own_masks:
        padding = torch.ones(_BATCH, _TOKENS if states else _EXTENT, dtype=torch.long, device=device)
        torch._dynamo.mark_dynamic(padding, 0)
        torch._dynamo.mark_dynamic(padding, 1)
    cache = interfaces.capture_cache(model, layers, extent, past, padding)
    masks = None if own_masks else stand_ins(model, call.masks, _BATCH, _TOKENS, device)
    names = ("inputs_embeds" if signature.embeds else "input_ids", cache_argument(model), states)
    return _forward, (model, inputs, positions, masks, cache, keep, names)


def _inputs(signature: Signature, call: Call, device: torch.device) -> Tensor:
    tail = (call.inputs.shape[-1],) if signature.embeds else ()
    made = torch.zeros(_BATCH, _TOKENS, *tail, dtype=signature.dtype, device=device)
    torch._dynamo.mark_dynamic(made, 0)
    torch._dynamo.mark_dynamic(made, 1)
    return made


def _forward(
    model: Any, inputs: Tensor, position_ids: Tensor, masks: Any, cache: Any, keep: Any, names: tuple[str, str, bool]
) -> Tensor:
    given = {names[0]: inputs, names[1]: cache, "position_ids": position_ids, "use_cache": True}
    given["attention_mask"] = cache.padding if masks is None else masks
    if masks is None and names[2]:  # of states, masks say nothing of earlier tokens
        torch._check(cache.padding.shape[1] == inputs.shape[1])
    if keep is not None:
        given["logits_to_keep"] = keep
    return type(model).forward(model, **given).logits


def sort_inputs(captured: Captured, masks: set[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Tell what is handed in at each call (graph value -> source) from what is bound now (graph value -> object)."""
    arguments: dict[str, str] = {}
    bound: dict[str, Any] = {}
    for entry in captured.inputs:
        if entry.source in VARYING or entry.source in masks or SIZE.fullmatch(entry.source):
            arguments[entry.node] = entry.source
        elif entry.kind != "symint":  # other sizes are those of tensors in the program, which give them
            bound[entry.node] = entry.value
    return arguments, bound


def check_outputs(captured: Captured) -> None:
    """Refuse a model that keeps tensors elsewhere than in its output: a program would not keep them."""
    output = next(node for node in reversed(captured.gm.graph.nodes) if node.op == "output")
    if len(output.args[0]) != 1:
        raise CaptureError("the model's forward keeps tensors outside of its output, which a program would not do")


def check_steps(steps: Sequence[Step], captured: Captured, masks: set[str] | None) -> None:
    """Refuse a model that computes with its masks: a program takes masks of any form, and hands them to attention. And
    one that computes with what a layer's attention hands on to that of the next. `masks`: their sources; None where the
    model makes them inside the trace."""
    handed = {step.outputs[1] for step in steps if isinstance(step, OpStep) and step.op.name == _HANDING_ON}
    for step in steps:
        if not (isinstance(step, OpStep) and step.op.name in _MIXERS) and handed & set(reads(step)):
            raise CaptureError("the model computes with what its attention hands on from layer to layer")
    mask_nodes = {entry.node for entry in captured.inputs if masks and entry.source in masks}
    sizes = {e.node: e.source for e in captured.inputs if e.kind == "symint" and not SIZE.fullmatch(e.source)}
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


Way = Literal["cut", "whole", "own masks"]
WAYS: tuple[Way, ...] = ("cut", "whole", "own masks")
"""How a trace sees attention: cut out of its layers; as whole modules; or as whole modules that get masks which the
model makes inside the trace, of one that says what is padding."""


@dataclass(frozen=True)
class Traced:
    """What came of tracing a model, or its template.

    Attributes:
        served: the program.
        reads: sources of everything in Python that the trace read.
        slots: what each op of experts is called with.
    """

    served: Served
    reads: frozenset[str]
    slots: Mapping[str, Slots]


def trace_program(
    model: PreTrainedModel,
    call: Call,
    plan: ExpertsPlan,
    template: Template | None,
    way: Way,
    registry: LayerRegistry,
    positions: Positions,
    report: Report,
    build: Callable[..., Built],
) -> Traced:
    """Trace a model, and build its program.

    Args:
        model: the model.
        call: a call that the program is to serve.
        plan: what happens to its experts.
        template: the layers that are traced, to be stamped over the others; None: trace all of them.
        way: how the trace sees attention.
        registry: the model's layers.
        positions: fills in those that calls leave out.
        report: receives the seconds of the trace.
        build: `build_program`, given all that depends on no trace.

    Raises:
        CaptureError, CompileError: it can't be traced, or compiled.
        AttributesReadError, NotStampableError: with a template, which does not show how to run all layers.
    """
    own_masks = way == "own masks"
    mask_names = set() if own_masks else set(mask_sources(call.masks))
    sources: set[str] = set()
    slots: dict[str, Slots] = {}
    start = time.perf_counter()

    def consume(captured: Captured) -> tuple[Recipe, ShapeAssumptions]:
        if template is not None:
            templates.check_reads(model, template, sources)
        report.phases["trace"] += time.perf_counter() - start
        check_outputs(captured)
        slots.update(read_slots(captured))
        arguments, bound = sort_inputs(captured, mask_names)
        how = None
        if template is not None:
            how = templates.stamping(model, template, captured, arguments, registry)
        built = build(
            captured,
            arguments=arguments,
            bound=bound,
            check=lambda steps, graph: check_steps(steps, graph, None if own_masks else mask_names),
            stamping=how,
            drop_unused=True,
        )
        lengths = [e for e in captured.inputs if e.source.startswith("L['cache']") and e.source != PADDING]
        unread = frozenset(entry.node for entry in lengths)
        return Recipe(built, how, traced_files(), unread), read_assumptions(captured, set(VARYING))

    if way == "cut":
        interfaces.give_attention_functions(model)
    shadow = Shadow(templates.short_model(model, template) if template is not None else model)
    interfaces.put_in_force(
        shadow, experts=plan.implementation, blocks=plan.blocks, routed=plan.routed, whole=way != "cut"
    )
    layers: dict[int, Any] = {}
    for layer in interfaces.attention_layers(shadow.root).values():
        layers[layer_index(layer)] = layer  # type: ignore[index]
    traced = example(shadow.root, call, layers, own_masks=own_masks)
    recipe, assumptions = capture(*traced, consume, sources)
    built = recipe.built
    names = positions, cache_argument(model)
    served = Served(built.program, assumptions, *names, output_type(model))
    served.uncompiled, served.recipe = built.uncompiled, recipe
    return Traced(served, frozenset(sources), slots)
