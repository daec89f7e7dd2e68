"""From a captured graph to a program: split, fingerprint, stamp, compile each distinct piece once, bind."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from glowplug.compilers.base import PieceCompiler, StoringCompiler
from glowplug.compilers.eager import EagerCompiler
from glowplug.compilers.parallel import Job, compile_jobs
from glowplug.errors import CompileError
from glowplug.graph.capture import Captured, is_restart
from glowplug.graph.fingerprint import Fingerprint, fingerprint
from glowplug.graph.split import LayerOf, OpStep, Piece, Step, split
from glowplug.graph.stamp import Bind, Locations, Own, Stamped, reads, stamp
from glowplug.layers.handle import LayerHandle
from glowplug.layers.registry import LayerRegistry
from glowplug.ops.layer_op import check_traced_order
from glowplug.program.emit import Runners, emit
from glowplug.program.ends import Ends, choose_ends, count_uses
from glowplug.program.loop import emit_stamped
from glowplug.program.program import Program, StepOutline
from glowplug.progress import piece_progress
from glowplug.report import Report
from glowplug.trace_log import log_pieces


@dataclass
class PieceCache:
    """Compiled pieces of one model, by fingerprint: programs for further signatures reuse them.

    Attributes:
        compiled: the pieces.
        order: the fingerprint of each distinct piece, those of `ends` too.
        ends: pieces that run uncompiled for now.
    """

    compiled: dict[Fingerprint, Callable[..., Sequence[Any]]] = field(default_factory=dict)
    order: list[Fingerprint] = field(default_factory=list)
    ends: list[Ends] = field(default_factory=list)
    lock: Any = field(default_factory=threading.RLock)

    def poll(self, report: Report, deadline: float | None = None) -> None:
        """Swap in what was compiled beside serving; wait for it until `deadline` (`time.monotonic()`), if given."""
        with self.lock:
            for ends in self.ends:
                ends.poll(self.compiled.__setitem__, deadline)
            self.ends = [ends for ends in self.ends if ends.pending]
            report.pending_pieces = sum(len(ends.runners) for ends in self.ends)


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
    """

    locations: Locations
    template: tuple[int, ...]
    kinds: tuple[int, ...]
    bind: Bind
    bind_to: Callable[[nn.Module, LayerRegistry], Bind]
    name_of: Callable[[int, str], str]


@dataclass(frozen=True)
class Built:
    """What a build gives.

    Attributes:
        program: the program.
        uncompiled: the same steps with uncompiled pieces, to compare with eager closely; None when asked for none, or
            when the pieces of `program` are uncompiled anyway.
        bind_to: `bind_to(model, registry, of, uncompiled=...)`: the same program for a copy of the model; `of` maps
            the id of what is bound to its copy. Only of a stamped program.
    """

    program: Program
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
    defer_ends: bool = False,
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
        defer_ends: pieces that run seldom in a step may start uncompiled, see `glowplug.program.ends`.

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
        uses = count_uses(prints if stamped is None else stamped.prints(prints)) if defer_ends else None
        runners, ends = _compile(steps, prints, compiler, cache, captured, uses)

    def write(pieces: Runners, values: Mapping[str, Any] = bound, bind: Bind | None = None) -> Program:
        if stamped is None or stamping is None:
            return emit(steps, prints, pieces, outputs, arguments, values)
        return emit_stamped(stamped, prints[: len(stamped.head)], pieces, arguments, values, bind or stamping.bind)

    def bind_to(model: nn.Module, registry: LayerRegistry, of: Mapping[int, Any], *, uncompiled: bool) -> Program:
        assert stamping is not None
        values = {
            name: registry.handles[value.name] if isinstance(value, LayerHandle) else of.get(id(value), value)
            for name, value in bound.items()
        }
        return write(graphs if uncompiled else runners, values, stamping.bind_to(model, registry))

    graphs: Runners = {found: step.gm.forward for step, found in _pieces(steps, prints)}

    with report.phase("bind"):
        program = write(runners)
        uncompiled = None
        if both and not isinstance(compiler, EagerCompiler):
            uncompiled = write(graphs)
        outline = _outline(steps, prints, captured)
        if stamped is not None and stamping is not None:
            outline = _stamped_outline(stamped, outline[: len(stamped.head)], stamping.name_of)
        program = replace(program, outline=outline)
        uncompiled = replace(uncompiled, outline=outline) if uncompiled is not None else None
        if ends is not None:
            ends.programs.append(program)
            report.pending_pieces += len(ends.runners)
    report.pieces += sum(step.fingerprint is not None for step in program.outline)
    report.distinct_pieces = len(set(cache.order))
    report.programs += 1
    report.outlines.append(program.outline)
    report.sources.append(program.listing())
    log_pieces(steps, prints, program.source)
    return Built(program, uncompiled, bind_to if stamped is not None else None)


def _pieces(steps: Sequence[Step], prints: Sequence[Fingerprint | None]) -> list[tuple[Piece, Fingerprint]]:
    pairs = zip(steps, prints, strict=True)
    return [(step, found) for step, found in pairs if isinstance(step, Piece) and found is not None]


def _compile(
    steps: Sequence[Step],
    prints: Sequence[Fingerprint | None],
    compiler: PieceCompiler,
    cache: PieceCache,
    captured: Captured,
    uses: Counter[Fingerprint] | None,
) -> tuple[dict[Fingerprint, Callable[..., Any]], Ends | None]:
    """Compile what is new; with `uses`, how often each piece runs, some of it later."""
    # Later duplicates overwrite earlier ones in `new`; any instance of a piece stands for all of them.
    new = {found: step for step, found in _pieces(steps, prints) if found not in cache.compiled}
    jobs = {
        found: Job(step.gm, [n.meta["example_value"] for n in step.gm.graph.nodes if n.op == "placeholder"])
        for found, step in new.items()
    }
    later = choose_ends(uses, new) if uses is not None and isinstance(compiler, StoringCompiler) else set()
    deferred = {found: jobs.pop(found) for found in later}
    local = _compile_jobs(jobs, compiler, cache, captured)
    ends = None
    # Asked last: a fork takes with it what compiling the others has loaded.
    if deferred and isinstance(compiler, StoringCompiler) and compiler.forks([j.inputs for j in deferred.values()]):
        ends = Ends(compiler, deferred, lambda: len(_guards(captured)))
        cache.ends.append(ends)
    else:
        local += _compile_jobs(deferred, compiler, cache, captured)
    cache.order += new
    runners = {found: cache.compiled[found] for found in prints if found in cache.compiled and found is not None}
    for found in local:  # it relies on relations between sizes that only this capture has written down
        del cache.compiled[found]
    return {**runners, **(ends.runners if ends is not None else {})}, ends


def _guards(captured: Captured) -> Sequence[Any]:
    """The relations between sizes that the capture has written down so far."""
    return captured.fake_mode.shape_env.guards if captured.fake_mode.shape_env else []


def _compile_jobs(
    jobs: Mapping[Fingerprint, Job], compiler: PieceCompiler, cache: PieceCache, captured: Captured
) -> list[Fingerprint]:
    """Compile pieces into the cache; returns those that hold in this capture alone.

    Raises:
        CompileError: the compiler failed.
    """
    local: list[Fingerprint] = []
    with piece_progress(len(jobs)) as advance:
        results = compile_jobs(compiler, list(jobs.values()), lambda: len(_guards(captured)), advance)
    for found, result in zip(jobs, results, strict=False):
        if result.error is not None:
            if is_restart(result.error):
                raise result.error
            what = f"{compiler.name} can't compile piece {found.digest[:12]}: {_brief(result.error)}"
            raise CompileError(what) from result.error
        if result.run is None:  # given up, as another piece failed
            continue
        cache.compiled[found] = result.run
        if result.local:
            local.append(found)
    return local


def _outline(
    steps: Sequence[Step], prints: Sequence[Fingerprint | None], captured: Captured
) -> tuple[StepOutline, ...]:
    sources = {entry.node: entry.source for entry in captured.inputs}
    one_of_each: dict[Fingerprint, Fingerprint] = {}
    outline = []
    for step, found in zip(steps, prints, strict=True):
        if isinstance(step, Piece) and found is not None:
            names = tuple(sources[name] for name in step.inputs if name in sources)
            outline.append(StepOutline(None, one_of_each.setdefault(found, found), names))
        elif isinstance(step, OpStep):
            names = tuple(sources[a.name] for a in step.args if getattr(a, "name", None) in sources)
            outline.append(StepOutline(step.op.name, None, names))
    return tuple(outline)


def _stamped_outline(
    stamped: Stamped, head: tuple[StepOutline, ...], name_of: Callable[[int, str], str]
) -> tuple[StepOutline, ...]:
    outline = list(head)
    for layer, unit in enumerate(stamped.sequence):
        for step in stamped.units[unit].steps:
            names = tuple(name_of(layer + r.offset, r.path) for r in step.wiring if isinstance(r, Own))
            op = step.step.op.name if isinstance(step.step, OpStep) else None
            outline.append(StepOutline(op, step.found, names))
    return tuple(outline)


def _brief(exc: Exception) -> str:
    lines = str(exc).strip().splitlines()
    return f"{type(exc).__name__}: {lines[0][:300]}" if lines else type(exc).__name__
