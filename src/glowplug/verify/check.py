"""Decides whether a program may serve.

1. Its uncompiled form, which does the same arithmetic, must equal the model's own forward in every case. This covers
   what structure alone can't prove: that one capture serves prefill and decode, that masks reach the right layers, and
   that no layer beyond the template does something that the template does not show.
2. Each compiled piece must equal its own graph on the inputs that the graph has in these cases.

One run of each case checks both. While pieces are being compiled, a process can do all but the second (`rehearse`).

If graphs are missing (a store could not keep those of a custom compiler's pieces), the whole compiled program is
compared with the model's own forward. In a deep model of half precision, rounding alone may then fail the comparison;
the program is rebuilt and has its graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from glowplug.errors import GlowplugError, NotServableError
from glowplug.graph.fingerprint import Fingerprint
from glowplug.program import Program
from glowplug.program.program import piece_name
from glowplug.reasons import said
from glowplug.verify.closeness import END_TO_END, EXACT, Tolerance, difference
from glowplug.verify.slots import GraphRun, Run, run_both, run_graph

Agree = Callable[[str | None], str | None]
"""For a model that several processes run together: shares the reason of one process with all."""
_MOST_HELD = 1 << 30
"""Bytes of activations that a rehearsal may hold. GLM-4.7 (92 layers of 5,120) takes 160 MiB."""


@dataclass(frozen=True)
class Case:
    """One call to compare.

    Attributes:
        what: the call in words.
        expected: the output of the model's own forward.
        run: runs a program on the call.
    """

    what: str
    expected: Any
    run: Callable[[Program], Any]


def why_wrong(
    program: Program, graphs: Program | None, cases: Iterable[Case], agree: Agree | None = None, *, once: bool = False
) -> str | None:
    """Why a program must not serve; None if it may.

    Args:
        program: the program.
        graphs: the same program with uncompiled pieces, may be `program` itself; None if graphs are missing.
        cases: the calls to compare. The iterator may raise `NotServableError` with a reason.
        agree: set if several processes run the model together; then either all or none of them pass graphs.
        once: compare each compiled piece only the first time that the program runs it, as an earlier process compared
            it at every layer.

    Raises:
        GlowplugError: raised by a run, other than `NotServableError`, if this process runs the model alone.
    """
    pairs: list[_Pair] = []
    tolerance = EXACT if graphs is not None else END_TO_END
    if graphs is not None:
        program, pairs = _paired(program, graphs, once)
    try:
        for case in cases:
            reason = _why_different(program, case, tolerance, raises=agree is None)
            reason = reason or next((pair.problem for pair in pairs if pair.problem is not None), None)
            reason = agree(reason) if agree is not None else reason
            if reason is not None:
                return reason
    except NotServableError as exc:
        return str(exc)
    return None


def _why_different(program: Program, case: Case, tolerance: Tolerance, *, raises: bool) -> str | None:
    try:
        actual = case.run(program)
    except NotServableError as exc:
        return str(exc)
    except Exception as exc:
        if isinstance(exc, GlowplugError) and raises:
            raise
        return f"the program raised {said(exc)}"
    problem = difference(actual, case.expected, tolerance, "the result")
    return f"the program differs from eager for {case.what}: {problem}" if problem is not None else None


@dataclass(frozen=True)
class Rehearsal:
    """All of a comparison that needs no compiled piece: the uncompiled program equals the model's own forward.

    Attributes:
        graphs: the uncompiled program.
        runs: every run of a graph in it, with its slot.
    """

    graphs: Program
    runs: tuple[tuple[Fingerprint, GraphRun], ...]

    def is_of(self, program: Program) -> bool:
        """Whether a program differs from the uncompiled one in its slots alone."""
        return program.code is self.graphs.code

    def why_wrong(self, program: Program) -> str | None:
        """The rest: why a program with compiled pieces must not serve; None if it may."""
        names = _compiled(program, self.graphs)
        for slot, run in self.runs:
            problem = run.problem_of(program.slots[slot]) if slot in names else None
            if problem is not None:
                return _differs(names[slot], problem)
        return None


def rehearse(graphs: Program, cases: Iterable[Case]) -> Rehearsal | None:
    """Compare a program of uncompiled pieces with the model's own forward; keep what their compiled forms must equal.

    Args:
        graphs: the program.
        cases: see `why_wrong`.

    Returns:
        None if they differ, or if too much would have to be kept: `why_wrong` then says why, or does without.

    Raises:
        GlowplugError: raised by a run.
    """
    runs: list[tuple[Fingerprint, GraphRun]] = []
    held = 0

    def recorded(slot: Fingerprint, graph: Run) -> Run:
        def run(*args: Any) -> Any:
            nonlocal held
            outputs, ran = run_graph(graph, args)
            kept = ran.kept()
            held += kept.nbytes
            if held > _MOST_HELD:
                raise MemoryError(f"a rehearsal holds more than {_MOST_HELD >> 20} MiB")
            runs.append((slot, kept))
            return outputs

        return run

    program = graphs.with_slots({slot: recorded(slot, graph) for slot, graph in graphs.slots.items()})
    for case in cases:
        if _why_different(program, case, EXACT, raises=True) is not None:
            return None
    return Rehearsal(graphs, tuple(runs))


class _Pair:
    """Runs a graph and its compiled form, and records how they differ."""

    def __init__(self, name: str, graph: Run, compiled: Run, once: bool) -> None:
        self.name = name
        self.graph = graph
        self.compiled = compiled
        self.once = once
        self.problem: str | None = None
        self._ended = False

    def __call__(self, *args: Any) -> Any:
        if self._ended:
            return self.graph(*args)
        outputs, problem = run_both(self.graph, self.compiled, args)
        self.problem = _differs(self.name, problem) if problem is not None else None
        self._ended = self.once or problem is not None
        return outputs


def _paired(program: Program, graphs: Program, once: bool) -> tuple[Program, list[_Pair]]:
    """A program in which each graph also runs its compiled form; and these pairs."""
    names = _compiled(program, graphs)
    pairs = {slot: _Pair(name, graphs.slots[slot], program.slots[slot], once) for slot, name in names.items()}
    return graphs.with_slots(pairs), list(pairs.values())


def _compiled(program: Program, graphs: Program) -> dict[Fingerprint, str]:
    """The slots in which a program has something else than the graphs -> their names."""
    numbered = enumerate(graphs.slots.items())
    return {slot: piece_name(number) for number, (slot, graph) in numbered if program.slots[slot] != graph}


def _differs(name: str, problem: str) -> str:
    return f"{name} differs from eager: {problem}"
