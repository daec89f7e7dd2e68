"""From a captured graph to a program: split, fingerprint, stamp, compile each distinct piece once, bind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from glowplug.compilers.base import PieceCompiler
from glowplug.compilers.eager import EagerCompiler
from glowplug.graph.capture import Captured
from glowplug.graph.fingerprint import Fingerprint, fingerprint
from glowplug.graph.split import LayerOf, Piece, Step, split
from glowplug.graph.stamp import Bind, Locations, Stamped, reads, stamp
from glowplug.layers.handle import LayerHandle
from glowplug.layers.registry import LayerRegistry
from glowplug.ops.layer_op import check_traced_order
from glowplug.program.emit import Runners
from glowplug.program.pieces import PieceCache, compile_pieces
from glowplug.program.plan import Plan, outline_of
from glowplug.program.program import Program
from glowplug.program.slots import count_uses
from glowplug.report import Report
from glowplug.trace_log import log_pieces


@dataclass(frozen=True)
class Stamping:
    """How to stamp a template over a stack.

    Attributes:
        locations: where the template's inputs lie.
        template: the kinds of the template's layers.
        kinds: the kinds of all layers.
        bind: finds the object that a layer has at a path.
        bind_to: the same for a copy of the model, given the copy and its registry.
        name_of: the qualified name of what a layer has at a path, for reports.
        stack: qualified name of the stack.
        handles: which paths in a layer are handles.
    """

    locations: Locations
    template: tuple[int, ...]
    kinds: tuple[int, ...]
    bind: Bind
    bind_to: Callable[[nn.Module, LayerRegistry], Bind]
    name_of: Callable[[int, str], str]
    stack: str = ""
    handles: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Built:
    """What a build gives.

    Attributes:
        program: the program.
        plan: what it was written from.
        bound: graph value -> object, for what is bound now.
        uncompiled: the same steps with uncompiled pieces, to compare with eager closely; None when asked for none, or
            when the pieces of `program` are uncompiled anyway.
        bind_to: `bind_to(model, registry, of, uncompiled=...)`: the same program for a copy of the model; `of` maps
            the id of what is bound to its copy. Only of a stamped program.
    """

    program: Program
    plan: Plan
    bound: Mapping[str, Any]
    uncompiled: Program | None = None
    bind_to: Callable[..., Program] | None = None


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
    both: bool = False,
    defer: bool = False,
    layer_of: LayerOf | None = None,
) -> Built:
    """Build the program of a captured graph, inside its capture.

    Args:
        captured: the graph; a template's, with `stamping`.
        compiler: compiles each piece whose fingerprint is new.
        report: receives counts and seconds.
        cache: compiled pieces so far; grows.
        arguments: graph value -> source, for what is handed in at each call.
        bound: graph value -> object, for what is bound now.
        check: may refuse the steps by raising.
        stamping: stamp the steps over a stack.
        drop_unused: leave out arguments that no step reads.
        both: also bind the steps with uncompiled pieces.
        layer_of: cut at the boundaries of layers, too.
        defer: pieces that run seldom in a step may start uncompiled, see `glowplug.program.slots`.

    Raises:
        CaptureError: the graph can't be cut.
        NotStampableError: with `stamping`: the graph does not show how to run the whole stack. Nothing was compiled.
        CompileError: the compiler failed.
    """
    with report.phase("split"):
        fixed = {entry.node for entry in captured.inputs if entry.node not in arguments and entry.kind != "symint"}
        steps, outputs = split(captured, fixed or None, layer_of)
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
            stamped = stamp(
                captured,
                steps,
                prints,
                outputs,
                locations=stamping.locations,
                template=stamping.template,
                kinds=stamping.kinds,
            )
    with report.phase("compile"), cache.lock:
        uses = count_uses(prints if stamped is None else stamped.prints(prints)) if defer else None
        # Later duplicates overwrite earlier ones; any instance of a piece stands for all of them.
        distinct = {found: step for step, found in _pieces(steps, prints)}
        before = cache.count
        runners = compile_pieces(distinct, compiler, cache, captured, uses)
        report.compiled_pieces += cache.count - before
    graphs: Runners = {found: step.gm.forward for found, step in distinct.items()}
    sources = {entry.node: entry.source for entry in captured.inputs}
    outline = tuple(outline_of(steps, prints, sources))
    head = len(steps) if stamped is None else len(stamped.head)
    plan = Plan(tuple(steps[:head]), tuple(prints[:head]), outputs, arguments, stamped, outline[:head])

    def bind_to(model: nn.Module, registry: LayerRegistry, of: Mapping[int, Any], *, uncompiled: bool) -> Program:
        assert stamping is not None
        values = {
            name: registry.handles[value.name] if isinstance(value, LayerHandle) else of.get(id(value), value)
            for name, value in bound.items()
        }
        return plan.write(graphs if uncompiled else runners, values, stamping.bind_to(model, registry))

    with report.phase("bind"):
        bind = stamping.bind if stamping is not None else None
        whole = plan.whole_outline(stamping.name_of if stamping is not None else None)
        program = replace(plan.write(runners, bound, bind), outline=whole)
        uncompiled = None
        if both and not isinstance(compiler, EagerCompiler):
            uncompiled = replace(plan.write(graphs, bound, bind), outline=whole)
        report.pending_pieces = len(cache.pending)
    report.pieces += sum(step.fingerprint is not None for step in program.outline)
    report.distinct_pieces = len(set(cache.order))
    report.programs += 1
    report.outlines.append(program.outline)
    report.sources.append(program.listing())
    log_pieces(steps, prints, program.source)
    return Built(program, plan, bound, uncompiled, bind_to if stamped is not None else None)


def _pieces(steps: Sequence[Step], prints: Sequence[Fingerprint | None]) -> list[tuple[Piece, Fingerprint]]:
    pairs = zip(steps, prints, strict=True)
    return [(step, found) for step, found in pairs if isinstance(step, Piece) and found is not None]
