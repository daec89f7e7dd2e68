"""A plan: everything that a program is made of, but for the objects. It has a form on disk; a program has none."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.split import OpStep, Step
from glowplug.graph.stamp import Local, Outside, Own, Reference, Stamped, reads
from glowplug.layers.registry import LayerRegistry
from glowplug.program.program import Program, StepOutline
from glowplug.program.write import DeepStep, Key, Slots, write_program


@dataclass(frozen=True)
class Binder:
    """Finds what a stamped program is bound to in the layers of a model.

    Attributes:
        stack: qualified name of the stack.
        layers: its layers.
        registry: finds their handles.
        handles: which paths in a layer are handles.
    """

    stack: str
    layers: Sequence[nn.Module]
    registry: LayerRegistry
    handles: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, stack: str, registry: LayerRegistry, handles: frozenset[str]) -> Binder:
        """The binder of a model."""
        layers: Any = model.get_submodule(stack)
        return cls(stack, tuple(layers), registry, handles)

    def find(self, layer: int, own: Own) -> Any:
        """The very object that a layer has at a path."""
        if own.path in self.handles:
            return self.registry.handles[self.name_of(layer, own)]
        return _getter(own.path)(self.layers[layer + own.offset])

    def name_of(self, layer: int, own: Own) -> str:
        """Its qualified name."""
        return ".".join(filter(None, (self.stack, str(layer + own.offset), own.path)))


_getter = functools.cache(operator.attrgetter)


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

    @functools.cached_property
    def deep(self) -> tuple[DeepStep, ...]:
        """Every step of the deep model, in the order in which they run."""
        steps = [
            DeepStep(step, slot, {name: name for name in reads(step)}, step.outputs)
            for step, slot in zip(self.steps, self.prints, strict=True)
        ]
        for layer, number in enumerate(self.stamped.sequence if self.stamped is not None else ()):
            for place, step in enumerate(self.stamped.units[number].steps):  # type: ignore[union-attr]
                inputs = {name: _source(ref, layer) for name, ref in step.inputs.items()}
                outputs = [(layer, place, at) if name else None for at, name in enumerate(step.step.outputs)]
                steps.append(DeepStep(step.step, step.fingerprint, inputs, outputs, layer))
        return tuple(steps)

    @property
    def returned(self) -> tuple[Any, ...]:
        """Where the program's outputs come from."""
        if self.stamped is None:
            return self.outputs
        return tuple(_source(ref, len(self.stamped.sequence) - 1) for ref in self.stamped.outputs)

    def pieces(self) -> tuple[Fingerprint, ...]:
        """Each distinct piece, in the order of first use."""
        return tuple(dict.fromkeys(step.slot for step in self.deep if step.slot is not None))

    def values(self) -> frozenset[str]:
        """Names of the graph values that `write` may ask for."""
        sources = [*self.returned, *(source for step in self.deep for source in step.inputs.values())]
        return frozenset(source for source in sources if isinstance(source, str))

    def write(self, slots: Slots, values: Mapping[str, Any], binder: Binder | None = None) -> Program:
        """The program.

        Args:
            slots: the callable of each distinct piece.
            values: graph value -> object, for what is bound and lies outside the stack.
            binder: finds what lies in the stack, for a stamped model.
        """
        find = binder.find if binder is not None else None
        program = write_program(self.deep, self.returned, self.arguments, slots, values, find)
        outline = [_outline(step, binder) for step in self.deep if binder is not None and step.layer is not None]
        return replace(program, outline=(*self.outline, *outline))


def _source(ref: Reference, layer: int) -> Key | Own:
    """What a reference means, as seen from a layer's unit."""
    if isinstance(ref, Own):
        return ref
    if isinstance(ref, Outside):
        return ref.name
    return (layer if isinstance(ref, Local) else layer - 1, ref.step, ref.output)


def _outline(deep: DeepStep, binder: Binder) -> StepOutline:
    assert deep.layer is not None
    names = tuple(binder.name_of(deep.layer, own) for own in deep.inputs.values() if isinstance(own, Own))
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
