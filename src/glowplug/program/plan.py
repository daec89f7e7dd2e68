"""A plan: everything that a program is made of, but for the objects. It has a form on disk; a program has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.split import OpStep, Step
from glowplug.graph.stamp import Bind, Outside, Own, Stamped, reads
from glowplug.program.emit import Runners, emit
from glowplug.program.loop import emit_stamped
from glowplug.program.program import Program, StepOutline


@dataclass(frozen=True)
class Plan:
    """How a model runs.

    Attributes:
        steps: of a full trace all steps, of a stamped model those of its head.
        prints: the fingerprint of each of them; None for an op step.
        outputs: graph values that a full trace returns.
        arguments: graph value -> its source, for what is handed in at each call, in call order.
        stamped: the units of a stamped model.
        outline: of `steps`, for reports.
    """

    steps: tuple[Step, ...]
    prints: tuple[Fingerprint | None, ...]
    outputs: tuple[str, ...]
    arguments: Mapping[str, str]
    stamped: Stamped | None
    outline: tuple[StepOutline, ...]

    def pieces(self) -> tuple[Fingerprint, ...]:
        """Each distinct piece, in the order of first use."""
        found = [*self.prints]
        if self.stamped is not None:
            found += [step.found for unit in self.stamped.units for step in unit.steps]
        return tuple(dict.fromkeys(one for one in found if one is not None))

    def values(self) -> frozenset[str]:
        """Names of the graph values that `write` may ask for."""
        found = {name for step in self.steps for name in reads(step)} | set(self.outputs)
        if self.stamped is not None:
            wiring = [ref for unit in self.stamped.units for step in unit.steps for ref in step.wiring]
            found |= {ref.name for ref in (*wiring, *self.stamped.outputs) if isinstance(ref, Outside)}
        return frozenset(found)

    def write(self, runners: Runners, values: Mapping[str, Any], bind: Bind | None = None) -> Program:
        """The program.

        Args:
            runners: the callable of each distinct piece.
            values: graph value -> object, for what is bound and lies outside the stack.
            bind: finds the object that a layer has at a path, for a stamped model.
        """
        if self.stamped is None:
            return emit(self.steps, self.prints, runners, self.outputs, self.arguments, values)
        assert bind is not None
        return emit_stamped(self.stamped, self.prints, runners, self.arguments, values, bind)

    def whole_outline(self, name_of: Callable[[int, str], str] | None = None) -> tuple[StepOutline, ...]:
        """The outline of all steps; `name_of` gives the qualified name of what a layer has at a path."""
        if self.stamped is None or name_of is None:
            return self.outline
        outline = list(self.outline)
        for layer, unit in enumerate(self.stamped.sequence):
            for step in self.stamped.units[unit].steps:
                names = tuple(name_of(layer + r.offset, r.path) for r in step.wiring if isinstance(r, Own))
                op = step.step.op.name if isinstance(step.step, OpStep) else None
                outline.append(StepOutline(op, step.found, names))
        return tuple(outline)


def outline_of(steps: Sequence[Step], prints: Sequence[Fingerprint | None], sources: Mapping[str, str]) -> list[Any]:
    """The outline of a trace's steps, given the source of each input of the graph."""
    one_of_each: dict[Fingerprint, Fingerprint] = {}
    outline = []
    for step, found in zip(steps, prints, strict=True):
        if isinstance(step, OpStep):
            names = tuple(sources[a.name] for a in step.args if getattr(a, "name", None) in sources)
            outline.append(StepOutline(step.op.name, None, names))
        elif found is not None:
            names = tuple(sources[name] for name in step.inputs if name in sources)
            outline.append(StepOutline(None, one_of_each.setdefault(found, found), names))
    return outline
