"""Builds a program from a captured graph: split, fingerprint, stamp, compile each distinct piece once, bind."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from glowplug.compilers.base import PieceCompiler
from glowplug.graph.capture import Captured
from glowplug.graph.fingerprint import fingerprint
from glowplug.graph.split import LayerOf, Piece, Step, split
from glowplug.graph.stamp import Locations, Stamped, reads, stamp
from glowplug.layers.handle import LayerHandle
from glowplug.layers.registry import LayerRegistry
from glowplug.ops.layer_op import check_traced_order
from glowplug.program.compiling import compile_ahead, compile_pieces
from glowplug.program.pieces import PieceCache
from glowplug.program.plan import Binder, Plan, outline_of
from glowplug.program.program import Program
from glowplug.program.write import Slots
from glowplug.report import Report
from glowplug.runtime.trace_log import log_pieces


@dataclass(frozen=True)
class Stamping:
    """How to stamp a template over a stack.

    Attributes:
        locations: where the template's inputs lie in the model.
        template: the kinds of the template's layers.
        kinds: the kinds of all layers.
        binder: finds the weights and handles of layers.
    """

    locations: Locations
    template: tuple[int, ...]
    kinds: tuple[int, ...]
    binder: Binder


@dataclass(frozen=True)
class Built:
    """The result of a build.

    Attributes:
        program: the program.
        plan: the plan that it was written from.
        bound: graph value -> object, for everything that is bound.
        graphs: the uncompiled form of each distinct piece, to compare with eager.
        binder: finds the weights and handles in the layers of a stamped model.
    """

    program: Program
    plan: Plan
    bound: Mapping[str, Any]
    graphs: Slots
    binder: Binder | None = None

    def for_copy(self, model: nn.Module, registry: LayerRegistry, of: Mapping[int, Any]) -> Program:
        """The same stamped program for a copy of the model. `of` maps the id of a bound object to the object's copy."""
        assert self.binder is not None
        values = {
            name: registry.handles[value.name] if isinstance(value, LayerHandle) else of.get(id(value), value)
            for name, value in self.bound.items()
        }
        binder = Binder.of(model, self.binder.stack, registry, self.binder.handles)
        return self.plan.write(self.program.slots, values, binder)


def begin_pieces(
    captured: Captured, *, compiler: PieceCompiler, cache: PieceCache, arguments: Mapping[str, str]
) -> None:
    """Let a helper begin to compile the pieces of a captured graph, for a program that is expected to have them; see
    `build_program`."""
    steps, _ = split(captured, _fixed(captured, arguments))
    pieces = {fingerprint(step.gm): step for step in steps if isinstance(step, Piece)}
    with cache.lock:
        compile_ahead(pieces, compiler, cache, captured)


def _fixed(captured: Captured, arguments: Mapping[str, str]) -> set[str] | None:
    """The inputs that are the same at each call."""
    return {e.node for e in captured.inputs if e.node not in arguments and e.type != "symint"} or None


def build_program(
    captured: Captured,
    *,
    compiler: PieceCompiler,
    report: Report,
    cache: PieceCache,
    arguments: Mapping[str, str],
    bound: Mapping[str, Any],
    check: Callable[[Sequence[Step], Captured], None] | None = None,
    stamping: Stamping | None = None,
    drop_unused: bool = False,
    defer: bool = False,
    layer_of: LayerOf | None = None,
    meanwhile: Callable[[Program], None] | None = None,
) -> Built:
    """Build the program of a captured graph, inside its capture.

    Args:
        captured: the graph; with `stamping`, the template's.
        compiler: compiles each piece whose fingerprint is new.
        report: receives counts and seconds.
        cache: the pieces compiled so far; receives the new ones.
        arguments: graph value -> source, for the call arguments.
        bound: graph value -> object, for everything that is bound.
        check: raises if it refuses the steps.
        stamping: how to stamp the steps over a stack; None for a full trace.
        drop_unused: leave out arguments that no step reads.
        defer: let pieces that run seldom start uncompiled, see `glowplug.program.slots`.
        layer_of: also cut at the boundaries of layers.
        meanwhile: see `compile_pieces`; gets the program with uncompiled pieces.

    Raises:
        CaptureError: the graph can't be cut.
        NotStampableError: with `stamping`, the graph does not show how to run the whole stack. Nothing was compiled.
        CompileError: the compiler failed.
    """
    with report.phase("split"):
        steps, outputs = split(captured, _fixed(captured, arguments), layer_of)
        check_traced_order(captured.gm)
        if check is not None:
            check(steps, captured)
    if drop_unused:
        used = {name for step in steps for name in reads(step)} | set(outputs)
        arguments = {name: source for name, source in arguments.items() if name in used}
    with report.phase("fingerprint"):
        prints = [fingerprint(step.gm) if isinstance(step, Piece) else None for step in steps]
    stamped: Stamped | None = None
    if stamping is not None:
        with report.phase("stamp"):
            locations, template, kinds = stamping.locations, stamping.template, stamping.kinds
            stamped = stamp(captured, steps, prints, outputs, locations=locations, template=template, kinds=kinds)
    sources = {entry.node: entry.source for entry in captured.inputs}
    head = len(steps) if stamped is None else len(stamped.head)
    outline = outline_of(steps[:head], prints[:head], sources)
    plan = Plan(tuple(steps[:head]), tuple(prints[:head]), outputs, arguments, stamped, outline)
    # Any instance of a piece stands for all of them.
    pairs = zip(steps, prints, strict=True)
    distinct = {slot: step for step, slot in pairs if isinstance(step, Piece) and slot is not None}
    graphs: Slots = {slot: piece.gm.forward for slot, piece in distinct.items()}
    with report.phase("bind"):
        binder = stamping.binder if stamping is not None else None
        uncompiled = plan.write(graphs, bound, binder)
    with report.phase("compile"), cache.lock:
        uses = Counter(step.slot for step in plan.deep if step.slot is not None) if defer else None
        before = cache.count
        beside = functools.partial(meanwhile, uncompiled) if meanwhile is not None else None
        program = uncompiled.with_slots(compile_pieces(distinct, compiler, cache, captured, uses, beside))
        report.compiled_pieces += cache.count - before
    report.pending_pieces = len(cache.pending)
    report.pieces += sum(step.fingerprint is not None for step in program.outline)
    report.distinct_pieces = len(set(cache.order))
    report.programs += 1
    report.outlines.append(program.outline)
    report.sources.append(program.listing())
    log_pieces(steps, prints, program.source)
    return Built(program, plan, bound, graphs, binder)
