"""Decides whether a program may serve.

1. Its uncompiled form, which does the same arithmetic, equals the model's own forward in every case. It covers what
   structure alone can't prove: that one capture serves a prefill and a decode step, that masks reach the right layers,
   that no layer beyond the template does something that the template does not show.
2. Each compiled piece equals its own graph, on the inputs that the graph has in these cases.

One run of each case finds out both. Where graphs are missing (pieces of a custom compiler from a store that could not
keep them), the compiled program is compared with the model's own forward as a whole, and what rounding makes of a deep
model in half precision is then reason enough not to use it: the program is made anew, and has its graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from glowplug.errors import GlowplugError, NotServableError
from glowplug.program import Program
from glowplug.program.program import piece_name
from glowplug.reasons import said
from glowplug.verify.closeness import END_TO_END, EXACT, Tolerance, difference
from glowplug.verify.slots import Run, run_both

Agree = Callable[[str | None], str | None]
"""Of a model that several processes run together: makes the reason that one finds the reason of all."""


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        what: the call in words.
        expected: what the model's own forward gives.
        run: runs a program on the call.
    """

    what: str
    expected: Any
    run: Callable[[Program], Any]


def why_wrong(
    program: Program, graphs: Program | None, cases: Iterable[Case], agree: Agree | None = None
) -> str | None:
    """Why a program must not serve; None when it may.

    Args:
        program: the program.
        graphs: the same steps with uncompiled pieces, which may be `program` itself; None where there is none.
        cases: the calls to compare. May raise `NotServableError` with a reason.
        agree: given where several processes run the model together; all of them then call this with graphs, or none.

    Raises:
        GlowplugError: what a run raised besides `NotServableError`, if this process runs the model alone.
    """
    pairs: list[_Pair] = []
    tolerance = EXACT if graphs is not None else END_TO_END
    if graphs is not None:
        program, pairs = _paired(program, graphs)
    try:
        for case in cases:
            reason = _why_different(program, case, tolerance, raises=agree is None) or _first_problem(pairs)
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
    found = difference(actual, case.expected, tolerance, "the result")
    return f"the program differs from eager for {case.what}: {found}" if found is not None else None


class _Pair:
    """A graph that also runs its compiled form, and notes how that differs."""

    def __init__(self, name: str, graph: Run, compiled: Run) -> None:
        self.name = name
        self.graph = graph
        self.compiled = compiled
        self.problem: str | None = None

    def __call__(self, *args: Any) -> Any:
        if self.problem is not None:
            return self.graph(*args)
        outputs, self.problem = run_both(self.graph, self.compiled, args)
        return outputs


def _paired(program: Program, graphs: Program) -> tuple[Program, list[_Pair]]:
    """The program of graphs, each of which also runs its compiled form; and these pairs."""
    pairs = {
        slot: _Pair(piece_name(number), graph, program.slots[slot])
        for number, (slot, graph) in enumerate(graphs.slots.items())
        if program.slots[slot] != graph
    }
    return graphs.with_slots(pairs), list(pairs.values())


def _first_problem(pairs: Iterable[_Pair]) -> str | None:
    return next((f"{pair.name} differs from eager: {pair.problem}" for pair in pairs if pair.problem is not None), None)
