"""From a captured graph to a program: split, fingerprint, compile each distinct piece once, bind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glowplug.compilers.base import PieceCompiler
from glowplug.graph.capture import Captured
from glowplug.graph.fingerprint import Fingerprint, fingerprint
from glowplug.graph.split import OpStep, Piece, Step, split
from glowplug.program.program import Program, emit
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
        if check is not None:
            check(steps, captured)
    with report.phase("fingerprint"):
        prints = [fingerprint(step.gm) if isinstance(step, Piece) else None for step in steps]
    with report.phase("compile"), cache.lock:
        runners = _compile(steps, prints, compiler, cache)
    with report.phase("bind"):
        program = emit(steps, runners, outputs, arguments, bound)
    known = [found for found in prints if found is not None]
    report.pieces += len(known)
    report.distinct_pieces = len(cache.order)
    report.programs += 1
    log_pieces(steps, prints, program.source)
    return program


def _compile(
    steps: Sequence[Step],
    prints: Sequence[Fingerprint | None],
    compiler: PieceCompiler,
    cache: PieceCache,
) -> list[Callable[..., Any] | None]:
    new = {p: s for p, s in zip(prints, steps, strict=True) if p is not None and p not in cache.compiled}
    with piece_progress(len(new)) as advance:
        # Later duplicates overwrite earlier ones in `new`; any instance of a piece stands for all of them.
        for found, step in new.items():
            assert isinstance(step, Piece)
            inputs = [n.meta["example_value"] for n in step.gm.graph.nodes if n.op == "placeholder"]
            cache.compiled[found] = compiler.compile(step.gm, inputs)
            cache.order.append(found)
            advance()
    return [cache.compiled[found] if found is not None else None for found in prints]


def op_steps(steps: Sequence[Step], name: str) -> list[OpStep]:
    """The calls of one splitting op, in order."""
    return [step for step in steps if isinstance(step, OpStep) and step.op.name == name]
