"""A program: flat steps in generated Python, weights and layers bound, nothing looked up while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from glowplug.graph.fingerprint import Fingerprint


@dataclass(frozen=True)
class Program:
    """A runnable program.

    Attributes:
        run: `run(*arguments)` -> tuple of the graph's outputs. Arguments in the order of `arguments`.
        arguments: sources of what changes from call to call.
        source: the Python text that runs.
        names: what the text's global names stand for: compiled pieces, ops, layers, tuples of weights.
        outline: its steps, for reports.
    """

    run: Callable[..., tuple[Any, ...]]
    arguments: tuple[str, ...]
    source: str
    names: dict[str, Any] = field(default_factory=dict, repr=False)
    outline: tuple[StepOutline, ...] = field(default=(), repr=False)

    def replace(self, old: Any, new: Any) -> None:
        """Let each global name that stands for one object stand for another, from the next run of a step on."""
        for table in (self.names, getattr(self.run, "__globals__", {})):
            for name in [name for name, value in table.items() if value is old]:
                table[name] = new


@dataclass(frozen=True)
class StepOutline:
    """One step of a program, for reports.

    Attributes:
        op: the splitting op's name; None for a piece.
        fingerprint: the piece's; None for an op.
        sources: paths of the weights and handles that the step reads.
    """

    op: str | None
    fingerprint: Fingerprint | None
    sources: tuple[str, ...]
