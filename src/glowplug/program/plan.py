"""A plan: everything that a program is made of, but for the objects. It has a form on disk; a program has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.split import OpStep, Step
from glowplug.graph.stamp import Bind, Local, Outside, Own, Reference, Stamped, reads
from glowplug.program.program import Program, StepOutline
from glowplug.program.write import DeepStep, Key, Slots, write_program


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

    def deep_steps(self) -> list[DeepStep]:
        """Every step of the deep model, in the order in which they run."""
        deep = [
            DeepStep(step, slot, {name: name for name in reads(step)}, step.outputs)
            for step, slot in zip(self.steps, self.prints, strict=True)
        ]
        if self.stamped is not None:
            for layer, unit in enumerate(self.stamped.sequence):
                for place, step in enumerate(self.stamped.units[unit].steps):
                    inputs = {name: _source(ref, layer) for name, ref in step.inputs.items()}
                    outputs = [(layer, place, at) if name else None for at, name in enumerate(step.step.outputs)]
                    deep.append(DeepStep(step.step, step.found, inputs, outputs, layer))
        return deep

    def pieces(self) -> tuple[Fingerprint, ...]:
        """Each distinct piece, those of the head first."""
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

    def write(
        self,
        slots: Slots,
        values: Mapping[str, Any],
        bind: Bind | None = None,
        name_of: Callable[[int, str], str] | None = None,
    ) -> Program:
        """The program.

        Args:
            slots: the callable of each distinct piece.
            values: graph value -> object, for what is bound and lies outside the stack.
            bind: finds the object that a layer has at a path, for a stamped model.
            name_of: the qualified name of that, for the outline; None: an outline of the head alone.
        """
        deep = self.deep_steps()
        outputs: list[Any] = [*self.outputs]
        if self.stamped is not None:
            outputs = [_source(ref, len(self.stamped.sequence) - 1) for ref in self.stamped.outputs]
        program = write_program(deep, outputs, self.arguments, slots, values, bind)
        if name_of is None:
            return replace(program, outline=self.outline)
        return replace(program, outline=(*self.outline, *(_outline(s, name_of) for s in deep[len(self.steps) :])))


def _source(ref: Reference, layer: int) -> Key | Own:
    """What a reference means, as seen from a layer's unit."""
    if isinstance(ref, Own):
        return ref
    if isinstance(ref, Outside):
        return ref.name
    return (layer if isinstance(ref, Local) else layer - 1, ref.step, ref.slot)


def _outline(deep: DeepStep, name_of: Callable[[int, str], str]) -> StepOutline:
    assert deep.layer is not None
    names = tuple(name_of(deep.layer + ref.offset, ref.path) for ref in deep.inputs.values() if isinstance(ref, Own))
    return StepOutline(deep.step.op.name if isinstance(deep.step, OpStep) else None, deep.slot, names)


def outline_of(
    steps: Sequence[Step], prints: Sequence[Fingerprint | None], sources: Mapping[str, str]
) -> tuple[StepOutline, ...]:
    """The outline of a trace's steps, given the source of each input of the graph."""
    return tuple(
        StepOutline(
            step.op.name if isinstance(step, OpStep) else None,
            found,
            tuple(sources[name] for name in reads(step) if name in sources),
        )
        for step, found in zip(steps, prints, strict=True)
    )
