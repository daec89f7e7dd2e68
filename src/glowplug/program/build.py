"""From a captured graph to a program: split, fingerprint, compile each distinct piece once, bind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from glowplug.compilers.base import PieceCompiler
from glowplug.errors import CompileError
from glowplug.graph.capture import Captured, is_restart
from glowplug.graph.fingerprint import Fingerprint, fingerprint
from glowplug.graph.split import OpStep, Piece, Step, split
from glowplug.ops.layer_op import check_traced_order
from glowplug.program.program import Program, StepOutline, emit
from glowplug.progress import piece_progress
from glowplug.report import Report
from glowplug.trace_log import log_pieces


@dataclass
class PieceCache:
    """Compiled pieces of one model, by fingerprint: programs for further signatures reuse them."""

    compiled: dict[Fingerprint, Callable[..., Sequence[Any]]] = field(default_factory=dict)
    order: list[Fingerprint] = field(default_factory=list)
    lock: Any = field(default_factory=threading.RLock)


def build_program(
    captured: Captured,
    *,
    compiler: PieceCompiler,
    report: Report,
    cache: PieceCache,
    arguments: Mapping[str, str],
    bound: Mapping[str, Any],
    check: Callable[[Sequence[Step], Captured], None] | None = None,
) -> Program:
    """Build the program of a captured graph, inside its capture.

    Args:
        captured: the graph.
        compiler: compiles each piece whose fingerprint is new.
        report: receives counts and seconds.
        cache: compiled pieces so far; grows.
        arguments: graph value -> source, for what is handed in at each call.
        bound: graph value -> object, for what is bound now.
        check: may refuse the steps by raising.

    Raises:
        CaptureError: the graph can't be cut.
    """
    with report.phase("split"):
        steps, outputs = split(captured)
        check_traced_order(captured.gm)
        if check is not None:
            check(steps, captured)
    with report.phase("fingerprint"):
        prints = [fingerprint(step.gm) if isinstance(step, Piece) else None for step in steps]
    with report.phase("compile"), cache.lock:
        runners = _compile(steps, prints, compiler, cache, captured)
    with report.phase("bind"):
        program = emit(steps, runners, outputs, arguments, bound)
        program = replace(program, outline=_outline(steps, prints, captured))
    known = [found for found in prints if found is not None]
    report.pieces += len(known)
    report.distinct_pieces = len(set(cache.order))
    report.programs += 1
    report.outlines.append(program.outline)
    log_pieces(steps, prints, program.source)
    return program


def _compile(
    steps: Sequence[Step],
    prints: Sequence[Fingerprint | None],
    compiler: PieceCompiler,
    cache: PieceCache,
    captured: Captured,
) -> list[Callable[..., Any] | None]:
    guards = captured.fake_mode.shape_env.guards if captured.fake_mode.shape_env else []
    local: list[Fingerprint] = []
    new = {p: s for p, s in zip(prints, steps, strict=True) if p is not None and p not in cache.compiled}
    with piece_progress(len(new)) as advance:
        # Later duplicates overwrite earlier ones in `new`; any instance of a piece stands for all of them.
        for found, step in new.items():
            assert isinstance(step, Piece)
            inputs = [n.meta["example_value"] for n in step.gm.graph.nodes if n.op == "placeholder"]
            relations = len(guards)
            try:
                cache.compiled[found] = compiler.compile(step.gm, inputs)
            except Exception as exc:
                if is_restart(exc):
                    raise
                raise CompileError(f"{compiler.name} can't compile piece {found.digest[:12]}: {_brief(exc)}") from exc
            cache.order.append(found)
            if len(guards) > relations:
                local.append(found)
            advance()
    runners = [cache.compiled[found] if found is not None else None for found in prints]
    for found in local:  # it relies on relations between sizes that only this capture has written down
        del cache.compiled[found]
    return runners


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


def op_steps(steps: Sequence[Step], name: str) -> list[OpStep]:
    """The calls of one splitting op, in order."""
    return [step for step in steps if isinstance(step, OpStep) and step.op.name == name]


def _brief(exc: Exception) -> str:
    lines = str(exc).strip().splitlines()
    return f"{type(exc).__name__}: {lines[0][:300]}" if lines else type(exc).__name__
