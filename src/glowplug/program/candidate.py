"""What a trace, or the store, gives: a program that serves once it was compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glowplug.graph.shapes import ShapeAssumptions
from glowplug.layers.watch import Watch
from glowplug.program.build import Built
from glowplug.program.program import Program


@dataclass(frozen=True)
class Traced:
    """What came of a trace.

    Attributes:
        built: its program, and what that was made of.
        files: of all code that was traced.
        unread: graph values that stood for sizes in the trace, and that no run reads.
        watch: finds changes of the model since a part of the comparison was done, if that was done while pieces were
            compiled.
    """

    built: Built
    files: frozenset[str]
    unread: frozenset[str]
    watch: Watch | None = None


@dataclass(frozen=True)
class Candidate:
    """A program that serves once it was compared with the model's own forward.

    Attributes:
        program: the program.
        assumptions: what its trace assumed of sizes.
        returns: what the front end needs to know to wrap its outputs; the comparison shows it.
        graphs: gives the program with uncompiled pieces, or None where some are missing.
        traced: what it was made of, if it was traced here.
        address: in the store; None when it is not there.
        proved: whether an earlier process compared it in every case.
    """

    program: Program
    assumptions: ShapeAssumptions
    returns: Any
    graphs: Callable[[], Program | None]
    traced: Traced | None = None
    address: str | None = None
    proved: bool = False
