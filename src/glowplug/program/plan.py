"""A plan: a program without the objects that it is bound to. Unlike a program, a plan can be stored."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn

from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.split import OpStep, Step
from glowplug.graph.stamp import Local, Once, Outside, Own, Reference, Stamped, reads
from glowplug.layers.registry import LayerRegistry
from glowplug.program.program import Program, StepOutline
from glowplug.program.write import DeepStep, Key, Slots, Wrap, write_program


class Binds(Protocol):
    """Finds what a stamped program needs in the layers of a model."""

    def find(self, layer: int, own: Own) -> Any:
        """The object that a layer has at a path."""
        ...

    def name_of(self, layer: int, own: Own) -> str:
        """The qualified name of the object that `find` returns."""
        ...


@dataclass(frozen=True)
class Binder:
    """Finds the weights and handles that a stamped program needs in the layers of a model.

    Attributes:
        stack: qualified name of the stack.
        layers: its layers.
        registry: holds their handles.
        handles: the paths in a layer that are handles.
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
        """The object that a layer has at a path."""
        if own.path in self.handles:
            return self.registry.handles[self.name_of(layer, own)]
        return _getter(own.path)(self.layers[layer + own.offset])

    def name_of(self, layer: int, own: Own) -> str:
        """The qualified name of the object that `find` returns."""
        return ".".join(filter(None, (self.stack, str(layer + own.offset), own.path)))


_getter = functools.cache(operator.attrgetter)


@dataclass(frozen=True)
class Plan:
    """How a model runs.

    Attributes:
        steps: all steps of a full trace; the head's steps of a stamped model.
        prints: the fingerprint of each of them; None for an op step.
        outputs: graph values that a full trace returns.
        arguments: graph value -> source of each call argument, in call order.
        stamped: the units of a stamped model.
        outline: the outline of `steps`, for reports.
    """

    steps: tuple[Step, ...]
    prints: tuple[Fingerprint | None, ...]
    outputs: tuple[str, ...]
    arguments: Mapping[str, str]
    stamped: Stamped | None
    outline: tuple[StepOutline, ...]

    @functools.cached_property
    def deep(self) -> tuple[DeepStep, ...]:
        """Every step of the deep model, in the order of execution."""
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
        """Sources of the program's outputs."""
        if self.stamped is None:
            return self.outputs
        return tuple(_source(ref, len(self.stamped.sequence) - 1) for ref in self.stamped.outputs)

    def pieces(self) -> tuple[Fingerprint, ...]:
        """The distinct pieces, in the order of first use."""
        return tuple(dict.fromkeys(step.slot for step in self.deep if step.slot is not None))

    def values(self) -> frozenset[str]:
        """Names of the graph values that `write` may need."""
        sources = [*self.returned, *(source for step in self.deep for source in step.inputs.values())]
        return frozenset(source for source in sources if isinstance(source, str))

    def write(
        self, slots: Slots, values: Mapping[str, Any], binder: Binds | None = None, wrap: Wrap | None = None
    ) -> Program:
        """Write the program.

        Args:
            slots: the callable of each distinct piece.
            values: graph value -> object, for bound objects outside the stack.
            binder: finds the objects inside the stack of a stamped model.
            wrap: makes the callable of each step, see `Wrap`.
        """
        find = binder.find if binder is not None else None
        program = write_program(self.deep, self.returned, self.arguments, slots, values, find, wrap)
        outline = list(self.outline)
        for deep in self.deep:
            if binder is not None and deep.layer is not None:
                owned = [binder.name_of(deep.layer, own) for own in deep.inputs.values() if isinstance(own, Own)]
                outline.append(_outline(deep.step, deep.slot, owned))

        def rewrite(slots: Slots, wrap: Wrap) -> Program:
            return self.write(slots, values, binder, wrap)

        return replace(program, outline=tuple(outline), rewrite=rewrite)


def _source(ref: Reference, layer: int) -> Key | Own:
    """What a reference in a layer's unit refers to."""
    if isinstance(ref, Own):
        return ref
    if isinstance(ref, Outside):
        return ref.name
    if isinstance(ref, Once):
        return ref.unit, ref.step, ref.output
    return (layer if isinstance(ref, Local) else layer - 1, ref.step, ref.output)


def _outline(step: Step, fingerprint: Fingerprint | None, sources: Iterable[str]) -> StepOutline:
    return StepOutline(step.op.name if isinstance(step, OpStep) else None, fingerprint, tuple(sources))


def outline_of(
    steps: Sequence[Step], prints: Sequence[Fingerprint | None], sources: Mapping[str, str]
) -> tuple[StepOutline, ...]:
    """The outline of a trace's steps, from the source of each graph input."""
    return tuple(
        _outline(step, fingerprint, (sources[name] for name in reads(step) if name in sources))
        for step, fingerprint in zip(steps, prints, strict=True)
    )
