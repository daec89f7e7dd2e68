"""Stamping: turns the steps of a template into the steps of the deep model by rewriting where each input comes from.

A **unit** is the steps from the first op of one layer up to the first op of the next: the back of a layer and the front
of the next one. If the graph was cut at its layers, a unit is one layer. The steps before the first unit are the
**head**. A unit may read its own values, those of the unit before it, values from outside the stack, and values that
one unit made for all later ones. If it reads anything else, the model can't be stamped.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from glowplug.errors import NotStampableError
from glowplug.graph.capture import Captured
from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.split import OpStep, Piece, Step, Value


@dataclass(frozen=True)
class Own:
    """A weight or handle of the unit's layer (`offset` 0) or of the next layer (1), by its path in the layer."""

    offset: int
    path: str


@dataclass(frozen=True)
class Local:
    """An output of an earlier step of the same unit."""

    step: int
    output: int


@dataclass(frozen=True)
class Previous:
    """An output of a step of the unit before."""

    step: int
    output: int


@dataclass(frozen=True)
class Once:
    """An output of a step of one unit of the template, which every later unit reads."""

    unit: int
    step: int
    output: int


@dataclass(frozen=True)
class Outside:
    """A value computed before the stack, an argument of the program, or a weight outside the stack, by graph name."""

    name: str


Reference = Own | Local | Previous | Once | Outside


@dataclass(frozen=True)
class UnitStep:
    """One step of a unit.

    Attributes:
        step: the template's piece or op step.
        fingerprint: the piece's fingerprint; None for an op step.
        inputs: graph value -> its origin, for every value that the step reads, in order.
        constants: the constant arguments of an op step, as canonical text.
    """

    step: Step
    fingerprint: Fingerprint | None
    inputs: Mapping[str, Reference]
    constants: str

    @property
    def code(self) -> tuple[Any, ...]:
        """What the step computes and which of its outputs are read, without the origin of its inputs."""
        digest = self.fingerprint.digest if self.fingerprint is not None else None
        computation = f"{self.step.op.name} {self.constants}" if isinstance(self.step, OpStep) else digest
        return computation, tuple(name is not None for name in self.step.outputs)

    @property
    def wiring(self) -> tuple[Reference, ...]:
        """The origin of each input."""
        return tuple(self.inputs.values())


@dataclass(frozen=True)
class Unit:
    """The steps from one layer's first op up to the next layer's first op."""

    steps: tuple[UnitStep, ...]

    @property
    def code(self) -> tuple[Any, ...]:
        """See `UnitStep.code`."""
        return tuple(step.code for step in self.steps)

    @property
    def owned(self) -> tuple[Own, ...]:
        """The weights and handles of layers that the unit reads, in order."""
        return tuple(ref for step in self.steps for ref in step.wiring if isinstance(ref, Own))

    @property
    def wiring(self) -> tuple[tuple[Reference, ...], ...]:
        """See `UnitStep.wiring`."""
        return tuple(step.wiring for step in self.steps)


@dataclass(frozen=True)
class Stamped:
    """The steps of a deep model, as units of its template.

    Attributes:
        head: the steps before the stack's first op.
        units: the template's units, one per layer of the template.
        sequence: the unit for each layer of the deep model.
        outputs: the origin of each of the program's outputs, as seen by the last unit.
    """

    head: tuple[Step, ...]
    units: tuple[Unit, ...]
    sequence: tuple[int, ...]
    outputs: tuple[Reference, ...]


@dataclass(frozen=True)
class Locations:
    """Where a template's inputs are in the model.

    Attributes:
        own: graph value -> (layer of the stack, path in the layer), for weights and handles in the stack.
        outside: graph values from outside the stack: arguments and other weights.
    """

    own: Mapping[str, tuple[int, str]]
    outside: frozenset[str]


def stamp(
    captured: Captured,
    steps: Sequence[Step],
    fingerprints: Sequence[Fingerprint | None],
    outputs: Sequence[str],
    *,
    locations: Locations,
    template: Sequence[int],
    kinds: Sequence[int],
) -> Stamped:
    """Stamp a template over the full depth.

    Args:
        captured: the template's graph.
        steps: the template's steps.
        fingerprints: the fingerprint of each piece; None for an op step.
        outputs: names of the graph's outputs.
        locations: where the template's inputs are.
        template: the kinds of the template's layers.
        kinds: the kinds of all layers, which begin with `template`.

    Raises:
        NotStampableError: the template does not show how to run the other layers; the message names the layers.
    """
    nodes = {node.name: node for node in captured.gm.graph.nodes}
    starts = _starts(steps, locations, len(template))
    head = tuple(steps[: starts[0]])
    bounds = list(zip(starts, [*starts[1:], len(steps)], strict=True))
    reader = _Reader(nodes, locations, head, _made_once([steps[start:stop] for start, stop in bounds]))
    units = []
    for layer, (start, stop) in enumerate(bounds):
        units.append(reader.unit(layer, steps[start:stop], fingerprints[start:stop]))
    sequence = _sequence(template, kinds, units)
    _check_once(reader.once, sequence)
    _check_alike(units, template, reader.once.values())
    _check_joints(units, sequence)
    last = len(units) - 1
    returned = tuple(reader.reference(last, name) for name in outputs)
    if any(isinstance(ref, (Previous, Once, Own)) for ref in returned):
        raise NotStampableError("the model returns a value of a layer before its last")
    return Stamped(head, tuple(units), sequence, returned)


def _starts(steps: Sequence[Step], locations: Locations, depth: int) -> list[int]:
    """The index of each layer's first op, or of its first step if the graph was cut at layers."""
    starts: list[int] = []
    at_layers = any(step.layer is not None for step in steps)
    for index, step in enumerate(steps):
        layer = step.layer if at_layers else _called_for(step, locations)
        if layer is None:
            continue
        if layer == len(starts):
            starts.append(index)
        elif layer != len(starts) - 1:
            raise NotStampableError(
                f"layer {layer} runs after layer {len(starts) - 1}: the stack does not run once, in order", (layer,)
            )
    if len(starts) != depth:
        raise NotStampableError(f"{len(starts)} of the template's {depth} layers ran", tuple(range(len(starts), depth)))
    for step in steps[starts[0] : starts[-1]]:
        if isinstance(step, OpStep) and not at_layers and _called_for(step, locations) is None:
            raise NotStampableError(f"{step.op.name} is called for a layer outside the stack, between its layers")
    return starts


def _called_for(step: Step, locations: Locations) -> int | None:
    """The layer that an op is called for; None for a piece, and for an op of a module outside the stack."""
    where = locations.own.get(getattr(step.args[0], "name", "")) if isinstance(step, OpStep) else None
    return where[0] if where is not None else None


def _made_once(units: Sequence[Sequence[Step]]) -> dict[str, int]:
    """The values that all units after the one that made them read -> that unit. At least three units must show it."""
    made = {name: unit for unit, steps in enumerate(units) for step in steps for name in step.outputs if name}
    readers: dict[str, set[int]] = {}
    for unit, steps in enumerate(units):
        for name in {name for step in steps for name in reads(step) if made.get(name, unit) != unit}:
            readers.setdefault(name, set()).add(unit)
    depth = len(units)
    return {name: made[name] for name, at in readers.items() if len(at) > 1 and at == set(range(made[name] + 1, depth))}


def _check_once(once: Mapping[str, int], sequence: Sequence[int]) -> None:
    """Check that a unit which makes such values runs once, at its own place."""
    for unit in set(once.values()):
        if sequence.count(unit) != 1 or sequence[unit] != unit:
            raise NotStampableError(f"layer {unit} makes a value that later layers read, and runs again", (unit,))


class _Reader:
    """Determines the origin of each value, as seen by the unit that reads it."""

    def __init__(
        self, nodes: Mapping[str, fx.Node], locations: Locations, head: Sequence[Step], once: Mapping[str, int]
    ) -> None:
        self.nodes = nodes
        self.locations = locations
        self.once = once
        self.produced: dict[str, tuple[int, int, int]] = {}
        self.head = {name for step in head for name in step.outputs if name is not None}
        self.of_stack: dict[fx.Node, bool] = {}

    def unit(self, layer: int, steps: Sequence[Step], fingerprints: Sequence[Fingerprint | None]) -> Unit:
        """Describe the steps of one layer's unit."""
        unit_steps = []
        for index, (step, fingerprint) in enumerate(zip(steps, fingerprints, strict=True)):
            inputs = {name: self.reference(layer, name) for name in reads(step)}
            unit_steps.append(UnitStep(step, fingerprint, inputs, _constants(step)))
            for output, name in enumerate(step.outputs):
                if name is not None:
                    self.produced[name] = (layer, index, output)
        return Unit(tuple(unit_steps))

    def reference(self, layer: int, name: str) -> Reference:
        """The origin of a value, as seen by a layer's unit."""
        if name in self.produced:
            unit, step, output = self.produced[name]
            if unit == layer:
                return Local(step, output)
            if name in self.once:
                return Once(unit, step, output)
            if unit == layer - 1:
                return Previous(step, output)
            raise NotStampableError(f"layer {layer} or {layer + 1} reads a value that layer {unit} made", (unit, layer))
        own = self.locations.own.get(name)
        if own is not None:
            if own[0] - layer not in (0, 1):
                raise NotStampableError(f"layer {layer} reads {own[1]} of layer {own[0]}", (layer, own[0]))
            return Own(own[0] - layer, own[1])
        if name in self.head:
            if layer > 0 and self._depends_on_stack(self.nodes[name]):
                raise NotStampableError(f"layer {layer} or {layer + 1} reads a value that layer 0 made", (0, layer))
            return Outside(name)
        if name in self.locations.outside:
            return Outside(name)
        raise NotStampableError(f"layer {layer} reads {name}, whose place in the model is unknown", (layer,))

    def _depends_on_stack(self, node: fx.Node) -> bool:
        """Whether a value depends on a weight or handle of the stack."""
        if node not in self.of_stack:
            is_own = node.name in self.locations.own
            self.of_stack[node] = is_own or any(map(self._depends_on_stack, node.all_input_nodes))
        return self.of_stack[node]


def reads(step: Step) -> list[str]:
    """Names of the graph values that a step reads, in order."""
    return list(step.inputs) if isinstance(step, Piece) else [value.name for value in _values(step.args)]


def _values(arg: Any) -> list[Value]:
    if isinstance(arg, (tuple, list)):
        return [value for item in arg for value in _values(item)]
    return [arg] if isinstance(arg, Value) else []


def _constants(step: Step) -> str:
    def text(arg: Any) -> str:
        if isinstance(arg, Value):
            return "%"
        if isinstance(arg, (tuple, list)):
            return f"[{', '.join(map(text, arg))}]"
        return repr(arg)

    return text(step.args) if isinstance(step, OpStep) else ""


def _sequence(template: Sequence[int], kinds: Sequence[int], units: Sequence[Unit]) -> tuple[int, ...]:
    """For each layer of the deep model, the layer of the template that shows how to run it: the first one with equal
    kinds (its own and its neighbours') that fits behind the unit before, or else the first one with equal kinds."""
    last, depth = len(template) - 1, len(kinds)
    shown: dict[tuple[int, ...], list[int]] = {}
    for index in range(1, last):
        shown.setdefault(tuple(template[index - 1 : index + 2]), []).append(index)
    sequence = [0]
    for layer in range(1, depth - 1):
        candidates = shown.get(tuple(kinds[layer - 1 : layer + 2]))
        if candidates is None:
            raise NotStampableError(f"the template does not show the neighbours of layer {layer}", (layer,))
        sequence.append(next((unit for unit in candidates if _fits(units, sequence[-1], unit)), candidates[0]))
    return (*sequence, last)


def _fits(units: Sequence[Unit], before: int, unit: int) -> bool:
    """Whether unit `before` provides what `unit` read from the unit before it in the template."""
    return before == unit - 1 or units[before].code == units[unit - 1].code


def _check_alike(units: Sequence[Unit], template: Sequence[int], makers: Collection[int]) -> None:
    """Check that layers of equal kinds between equal kinds gave equal units. This detects a layer that looks like
    another but computes something else. The first unit is exempt: it runs only the first layer, and it may read less
    than the others, which also read values of the unit before them. So are the `makers` of values for later units."""
    by_pair: dict[tuple[int, ...], int] = {}
    by_triple: dict[tuple[int, ...], int] = {}
    for layer in (layer for layer in range(1, len(units) - 1) if layer not in makers):
        first = by_pair.setdefault(tuple(template[layer : layer + 2]), layer)
        if units[layer].code != units[first].code or units[layer].owned != units[first].owned:
            raise NotStampableError(
                f"layers {first} and {layer} look alike, but compute different things", (first, layer)
            )
        first = by_triple.setdefault(tuple(template[layer - 1 : layer + 2]), layer)
        if units[layer].wiring != units[first].wiring:
            raise NotStampableError(f"layers {first} and {layer} look alike, but read different values", (first, layer))
    ops: dict[int, tuple[int, list[Any]]] = {}
    for layer, unit in enumerate(units[1:], 1):
        calls = [step.code[0] for step in unit.steps if isinstance(step.step, OpStep) and not _is_outside(step)]
        first, expected = ops.setdefault(template[layer], (layer, calls))
        if calls != expected:
            raise NotStampableError(
                f"layers {first} and {layer} look alike, but call their ops differently", (first, layer)
            )


def _is_outside(step: UnitStep) -> bool:
    """Whether an op is called for a module outside the stack, such as a model's head."""
    return isinstance(next(iter(step.inputs.values()), None), Outside)


def _check_joints(units: Sequence[Unit], sequence: Sequence[int]) -> None:
    for layer in range(1, len(sequence)):
        if not _fits(units, sequence[layer - 1], sequence[layer]):
            raise NotStampableError(f"layer {layer} does not fit behind layer {layer - 1}", (layer - 1, layer))
