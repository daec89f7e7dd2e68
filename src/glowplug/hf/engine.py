"""The engine of one transformers model: reads each call, builds a program where one is missing, runs it, or falls back
to the model's own forward with a recorded reason.
"""

from __future__ import annotations

import functools
import inspect
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from glowplug.compilers import get_compiler, warm_up
from glowplug.errors import CaptureError, GlowplugError, LayerOrderError, NotServableError
from glowplug.graph.capture import Captured, capture
from glowplug.graph.shapes import ShapeAssumptions, read_assumptions
from glowplug.graph.split import Piece, Step
from glowplug.hf import experts as hf_experts
from glowplug.hf import interfaces, verify
from glowplug.hf.call import Call, Signature, read_call
from glowplug.hf.masks import mask_sources, stand_ins
from glowplug.layers.context import ForwardContext, forward_context
from glowplug.layers.registry import LayerRegistry, register_layers
from glowplug.layers.watch import Watch
from glowplug.options import Options
from glowplug.program import PieceCache, Program, build_program
from glowplug.report import Report

_BATCH, _TOKENS, _KEPT, _EXTENT, _PAST = 2, 8, 5, 11, 3
"""Sizes of the capture: at least 2 and all different, so that none is taken for another."""


@dataclass
class Served:
    """A program and what its calls must fulfil."""

    program: Program
    assumptions: ShapeAssumptions
    output_type: type
    checked: dict[tuple[int, ...], str | None]


class Engine:
    """Stands in for `model.forward`. Made by `glowplug.compile`.

    Args:
        model: a decoder-only causal language model, in eval mode.
        options: how to compile it.
    """

    def __init__(self, model: PreTrainedModel, options: Options) -> None:
        functools.update_wrapper(self, type(model).forward, updated=())
        self.__signature__ = inspect.signature(type(model).forward.__get__(model))
        self.model = model
        self.options = options
        self.compiler = get_compiler(options.compiler)
        self.report = Report(compiler=self.compiler.name)
        self.registry: LayerRegistry | None = None
        self.check_order = True
        self._lock = threading.RLock()
        self._reset()

    def _reset(self) -> None:
        self._served: dict[Signature, Served | str] = {}
        self._pieces = PieceCache()
        self._watch: Watch | None = None
        self._reads: set[str] = set()
        self._implementations: tuple[Any, ...] = ()
        self._stale: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        model = memo.get(id(self.model))
        if model is None:
            raise NotServableError("a compiled forward can't be copied without its model; copy the model")
        return Engine(model, self.options)

    def __reduce__(self) -> tuple[Any, ...]:
        return Engine, (self.model, self.options)

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, by the program where it can serve."""
        reason = self._unfit(kwargs.get("inputs_embeds"))
        call = read_call(self.model, args, kwargs) if reason is None else reason
        if isinstance(call, str):
            return self._eager(call, args, kwargs)
        served = self._served.get(call.signature)
        if served is None:
            served = self._build(call)
        if isinstance(served, str):
            return self._eager(served, args, kwargs)
        broken = self._broken_shapes(served, call)
        if broken is not None:
            return self._eager(broken, args, kwargs)
        return self.run_program(served, call)

    # -- running ------------------------------------------------------------------------------------------------

    def run_program(self, served: Served, call: Call) -> Any:
        """Run a program on a call that it can serve."""
        assert self.registry is not None
        with torch.no_grad(), forward_context(ForwardContext(self.registry, call.cache, self.check_order)):
            (logits,) = served.program.run(*self._arguments(served.program.arguments, call))
        output = served.output_type(logits=logits, past_key_values=call.cache)
        return output.to_tuple() if call.return_tuple else output

    @staticmethod
    def _arguments(sources: Sequence[str], call: Call) -> list[Any]:
        values: list[Any] = []
        for source in sources:
            values.append(_READERS[source](call) if source in _READERS else _read_other(source, call))
        return values

    def _broken_shapes(self, served: Served, call: Call) -> str | None:
        kept = call.keep.shape[0] if call.keep is not None else 0
        key = (*call.inputs.shape, kept)
        if key not in served.checked:
            shapes = {"L['inputs']": tuple(call.inputs.shape), "L['position_ids']": tuple(call.position_ids.shape)}
            if call.keep is not None:
                shapes["L['keep']"] = tuple(call.keep.shape)
            served.checked[key] = served.assumptions.broken_by(shapes)
        return served.checked[key]

    def _eager(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.options.strict:
            raise NotServableError(f"{reason} (strict=True: nothing runs eager)")
        self.report.fall_back(reason)
        return type(self.model).forward(self.model, *args, **kwargs)

    def outline_only(self) -> Report:
        """Capture and cut the model for token ids, without running it."""
        ids = torch.zeros(1, 2, dtype=torch.long, device=next(self.model.parameters()).device)
        positions = torch.arange(2, device=ids.device).unsqueeze(0)
        call = read_call(self.model, (), {"input_ids": ids, "position_ids": positions, "use_cache": True})
        if isinstance(call, str):
            self.report.fall_back(call)
            return self.report
        found = self._build(call)
        if isinstance(found, str):
            self.report.fall_back(found)
        return self.report

    # -- what can't be served ---------------------------------------------------------------------------------

    def _unfit(self, embeds: Any = None) -> str | None:
        """Why no call can be served now, or None."""
        model = self.model
        if model.training:
            return "the model is in training mode; call model.eval()"
        if torch.is_grad_enabled() and (self._needs_grad() or getattr(embeds, "requires_grad", False)):
            return "grad mode is on and the model's weights or inputs need gradients; run under torch.no_grad()"
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return "autocast is on; load the model in the dtype that it is to run in"
        if self._watch is not None:
            changed = self._changed()
            if changed is not None:
                return changed
        return self._stale

    def _needs_grad(self) -> bool:
        return any(parameter.requires_grad for parameter in self.model.parameters())

    def _changed(self) -> str | None:
        assert self._watch is not None
        if self._read_implementations() != self._implementations:
            what = "the attention or experts implementation was changed after compiling"
            self._stale = f"{what}; call glowplug.compile(model) again"
        elif self._stale is None:
            reason = self._watch.change()
            if reason is not None:
                self._stale = f"the model was changed after compiling: {reason}; call glowplug.compile(model) again"
        return self._stale

    def _read_implementations(self) -> tuple[Any, ...]:
        config = self.model.config.get_text_config()
        return config._attn_implementation, getattr(config, "_experts_implementation", None)

    # -- building ---------------------------------------------------------------------------------------------

    def _build(self, call: Call) -> Served | str:
        with self._lock:
            found = self._served.get(call.signature)
            if found is None:
                warm_up(self.compiler, call.inputs.device.type)
                try:
                    found = self._capture(call)
                    if self.options.verify == "once":
                        with self.report.phase("verify"):
                            problem = verify.compare(self, found, call)
                        if problem is not None:
                            found = problem
                except LayerOrderError:
                    raise
                except GlowplugError as exc:
                    found = str(exc)
                self._served[call.signature] = found
                if isinstance(found, str):
                    self.report.strategy = "eager"
                self._watch = Watch(self.model, self._reads)
                self._implementations = self._read_implementations()
            return found

    def _capture(self, call: Call) -> Served:
        signature, device = call.signature, call.inputs.device
        model, report = self.model, self.report
        plan = hf_experts.plan(model, self.options.experts)
        if self.registry is None:
            self.registry = register_layers(model, identity=self.options.resolved_identity, layers=plan.layers)
            for op, names in plan.orders.items():
                self.registry.set_order(op, names)
        report.experts, report.strategy = plan.kind, self.options.resolved_identity
        masks = stand_ins(call.masks, _BATCH, _TOKENS, device)
        inputs = _example_inputs(signature, call, device)
        lead = signature.position_lead
        positions = torch.arange(_TOKENS, device=device).expand(*lead, _BATCH, _TOKENS).contiguous()
        torch._dynamo.mark_dynamic(positions, len(lead))
        torch._dynamo.mark_dynamic(positions, len(lead) + 1)
        keep = torch.arange(_KEPT, device=device) if signature.keeps else None
        if keep is not None:
            torch._dynamo.mark_dynamic(keep, 0)
        by_index = {layer.layer_idx: layer for layer in interfaces.attention_layers(model).values()}
        extent, past = torch.empty(_EXTENT, device=device), torch.empty(_PAST, device=device)
        torch._dynamo.mark_dynamic(extent, 0)
        torch._dynamo.mark_dynamic(past, 0)
        cache = interfaces.CaptureCache(by_index, extent, past)  # type: ignore[arg-type]

        sources = {"L['inputs']", "L['position_ids']", "L['keep']"}
        mask_names = mask_sources(call.masks)

        def consume(captured: Captured) -> tuple[Program, ShapeAssumptions]:
            report.phases["trace"] += clock()
            arguments, bound = _sort_inputs(captured, sources, set(mask_names))
            program = build_program(
                captured,
                compiler=self.compiler,
                report=report,
                cache=self._pieces,
                arguments=arguments,
                bound=bound,
                check=lambda steps, graph: _check_steps(steps, graph, mask_names),
            )
            return program, read_assumptions(captured, sources)

        with interfaces.in_force(model, experts=plan.implementation, blocks=plan.blocks, routed=plan.routed):
            clock = _Clock()
            args = (model, inputs, positions, masks, cache, keep)
            traced = _traced_embeds if signature.embeds else _traced_ids
            entry = traced if signature.keeps else _without_keep(traced)
            program, assumptions = capture(entry, args, consume, self._reads)
        return Served(program, assumptions, verify.output_type(model), {})


class _Clock:
    """Seconds since it was made, once."""

    def __init__(self) -> None:
        import time

        self._now = time.perf_counter
        self._start = self._now()

    def __call__(self) -> float:
        return self._now() - self._start


def _traced_ids(model: Any, inputs: Tensor, position_ids: Tensor, masks: Any, cache: Any, keep: Any) -> Tensor:
    return (
        type(model)
        .forward(
            model,
            input_ids=inputs,
            attention_mask=masks,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        .logits
    )


def _traced_embeds(model: Any, inputs: Tensor, position_ids: Tensor, masks: Any, cache: Any, keep: Any) -> Tensor:
    return (
        type(model)
        .forward(
            model,
            inputs_embeds=inputs,
            attention_mask=masks,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        .logits
    )


def _traced_ids_all(model: Any, inputs: Tensor, position_ids: Tensor, masks: Any, cache: Any, keep: Any) -> Tensor:
    return (
        type(model)
        .forward(
            model,
            input_ids=inputs,
            attention_mask=masks,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        .logits
    )


def _without_keep(traced: Any) -> Any:
    if traced is _traced_embeds:
        raise CaptureError("inputs_embeds for a model without logits_to_keep")
    return _traced_ids_all


def _example_inputs(signature: Signature, call: Call, device: torch.device) -> Tensor:
    if signature.embeds:
        example = torch.zeros(_BATCH, _TOKENS, call.inputs.shape[-1], dtype=signature.dtype, device=device)
    else:
        example = torch.zeros(_BATCH, _TOKENS, dtype=signature.dtype, device=device)
    torch._dynamo.mark_dynamic(example, 0)
    torch._dynamo.mark_dynamic(example, 1)
    return example


_READERS: dict[str, Any] = {
    "L['inputs']": lambda call: call.inputs,
    "L['position_ids']": lambda call: call.position_ids,
    "L['keep']": lambda call: call.keep,
    "L['inputs'].size()[0]": lambda call: call.inputs.shape[0],
    "L['inputs'].size()[1]": lambda call: call.inputs.shape[1],
    "L['keep'].size()[0]": lambda call: call.keep.shape[0],
}


_SIZE = re.compile(r"L\['(inputs|position_ids|keep)'\]\.size\(\)\[(\d+)\]|L\['cache'\]\.past\.size\(\)\[0\]")


def _read_other(source: str, call: Call) -> Any:
    if source.startswith("L['cache']"):
        return int(call.cache.get_seq_length()) if call.cache is not None else 0
    size = _SIZE.fullmatch(source)
    if size is not None:
        return getattr(call, size[1]).shape[int(size[2])]
    for name, key in mask_sources(call.masks).items():
        if name == source:
            return call.masks if key is None else call.masks[key]  # type: ignore[index]
    raise KeyError(source)


def _sort_inputs(captured: Captured, varying: set[str], masks: set[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Tell what is handed in at each call from what is bound now."""
    arguments: dict[str, str] = {}
    bound: dict[str, Any] = {}
    for entry in captured.inputs:
        if entry.source in varying or entry.source in masks or _SIZE.fullmatch(entry.source):
            arguments[entry.node] = entry.source
        elif entry.kind != "symint":  # other sizes are those of tensors in the program, which give them
            bound[entry.node] = entry.value
    return arguments, bound


def _check_steps(steps: Sequence[Step], captured: Captured, masks: dict[str, str | None]) -> None:
    """Refuse a model that computes with its masks: a program takes masks of any form, and hands them to attention."""
    mask_nodes = {entry.node for entry in captured.inputs if entry.source in masks}
    sizes = {e.node: e.source for e in captured.inputs if e.kind == "symint" and not _SIZE.fullmatch(e.source)}
    for step in steps:
        if isinstance(step, Piece):
            used = bool(mask_nodes & set(step.inputs))
            for name in sizes.keys() & set(step.inputs):
                raise CaptureError(f"a piece depends on a size that no tensor of it has: {sizes[name]}")
        else:
            mask = step.args[4] if step.op.name == "glowplug::attention" else None
            used = mask is not None and getattr(mask, "name", None) not in mask_nodes
        if used:
            raise CaptureError("the model computes with its attention mask inside its layers")


def attach(model: PreTrainedModel, options: Options) -> None:
    """Put an engine in the place of the model's forward."""
    model.__dict__.pop("forward", None)
    engine = Engine(model, options)
    object.__setattr__(model, "forward", engine)


def engine_of(model: nn.Module) -> Engine | None:
    """The model's engine, or None."""
    found = model.__dict__.get("forward")
    return found if isinstance(found, Engine) else None
