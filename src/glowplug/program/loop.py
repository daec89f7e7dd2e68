"""Writes a stamped program: the head, then the units of the layers, repetition as a `for` loop over bound layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.split import OpStep, Piece
from glowplug.graph.stamp import Bind, Local, Outside, Own, Previous, Reference, Stamped, Unit, UnitStep
from glowplug.program.emit import Emitter, Runners, emit_steps
from glowplug.program.program import Program

_LONGEST_PERIOD = 16
Slot = tuple[int, int]
"""An output of a unit: step, place among its outputs."""
Header = dict[tuple[int, str | None], str]
"""(step of a unit, graph value, or None for a piece's weights) -> the loop variable that holds it."""


def emit_stamped(
    stamped: Stamped,
    prints: Sequence[Fingerprint | None],
    runners: Runners,
    arguments: Mapping[str, str],
    bound: Mapping[str, Any],
    bind: Bind,
) -> Program:
    """Bind a stamped model into a program.

    Args:
        stamped: the units and their sequence.
        prints: the fingerprint of each piece of the head; None for an op step.
        runners: the callable of each distinct piece.
        arguments: graph value -> its source, for what is handed in at each call, in call order.
        bound: graph value -> object, for what lies outside the stack.
        bind: finds the object that a layer has at a path.
    """
    writer = _Writer(stamped, Emitter(bound, runners), bind)
    emitter = writer.emitter
    parameters = [emitter.local(value) for value in arguments]
    kept = {
        ref.name for unit in stamped.units for step in unit.steps for ref in step.wiring if isinstance(ref, Outside)
    }
    kept |= {ref.name for ref in stamped.outputs if isinstance(ref, Outside)}
    emit_steps(emitter, stamped.head, prints, kept)
    writer.layers()
    return emitter.finish(parameters, [writer.name(ref) for ref in stamped.outputs], arguments)


@dataclass(frozen=True)
class Run:
    """A stretch of the sequence: `times` repetitions of `period` layers, from layer `start`."""

    start: int
    period: int
    times: int


def fold(sequence: Sequence[int]) -> list[Run]:
    """Find the repetition in a sequence of units; what does not repeat at least three times stays as it is."""
    runs: list[Run] = []
    start = 0
    while start < len(sequence):
        best = Run(start, 1, 1)
        for period in range(1, _LONGEST_PERIOD + 1):
            body = sequence[start : start + period]
            times = 1
            while sequence[start + times * period : start + (times + 1) * period] == body:
                times += 1
            if times > 2 and times * period > best.times * best.period:
                best = Run(start, period, times)
        runs.append(best)
        start += best.period * best.times
    return runs


@dataclass
class _Writer:
    """Writes the layers.

    A unit's outputs are locals named by their place in the unit, so that the next unit, in a loop or not, finds them.
    """

    stamped: Stamped
    emitter: Emitter
    bind: Bind
    slots: dict[Slot, str] = field(default_factory=dict)
    readers: dict[str, int] = field(default_factory=dict)

    def layers(self) -> None:
        """Write all of them."""
        for run in fold(self.stamped.sequence):
            layers = range(run.start, run.start + run.period)
            if run.times == 1:
                self.comment(run.start, 1, 1)
                self.unit(run.start, self.followers(layers[0], run), None)
                continue
            self.comment(run.start, run.period, run.times)
            rows, header = self.rows(run)
            names = [name for unit in header for name in dict.fromkeys(unit.values())]
            table = f"LAYERS_{run.start}_TO_{run.start + run.period * run.times - 1}"
            self.emitter.objects[table] = rows
            self.emitter.line(f"for {', '.join(names)}{',' * (len(names) == 1)} in {table}:")
            self.emitter.indent += "    "
            for phase, layer in enumerate(layers):
                self.unit(layer, self.followers(layer, run), header[phase])
            self.emitter.indent = self.emitter.indent[:-4]

    def comment(self, start: int, period: int, times: int) -> None:
        """Say which layers the lines below run."""
        if times == 1:
            self.emitter.line(f"# layer {start}")
        else:
            step = f", {period} at a time" if period > 1 else ""
            self.emitter.line(f"# layers {start} to {start + period * times - 1}{step}")

    def followers(self, layer: int, run: Run) -> list[Unit]:
        """The units that run right behind a layer of a run's period, over all its repetitions."""
        sequence, units = self.stamped.sequence, self.stamped.units
        places = {layer + repeat * run.period + 1 for repeat in range(run.times)}
        return [units[number] for number in sorted({sequence[place] for place in places if place < len(sequence)})]

    def rows(self, run: Run) -> tuple[tuple[Any, ...], list[Header]]:
        """What a loop goes over, a row a repetition; and for each unit of the period, the names of its items.

        A row holds whatever is a layer's own: the layer objects of ops, and the weights of pieces, a tuple a piece.
        """
        header = [self.items(run.start + phase) for phase in range(run.period)]
        rows = []
        for repeat in range(run.times):
            row: list[Any] = []
            for phase, names in enumerate(header):
                layer = run.start + repeat * run.period + phase
                chosen = {name: key for key, name in reversed(names.items())}
                row += [self.item(layer, *chosen[name]) for name in dict.fromkeys(names.values())]
            rows.append(tuple(row))
        return tuple(rows), header

    def items(self, layer: int) -> Header:
        """The items of a row that a unit needs; one for two ops that are called for the same layer object."""
        names: Header = {}
        shared: dict[Own, str] = {}
        for index, step in enumerate(self.unit_of(layer).steps):
            if isinstance(step.step, Piece):
                if any(isinstance(ref, Own) for ref in step.wiring):
                    names[index, None] = self.emitter.fresh("weights")
                continue
            for value, ref in step.inputs.items():
                if isinstance(ref, Own):
                    stem = "layer" if value == step.step.args[0].name else ref.path.rpartition(".")[2]
                    shared[ref] = shared.get(ref) or self.emitter.fresh(stem)
                    names[index, value] = shared[ref]
        return names

    def unit_of(self, layer: int) -> Unit:
        """The template's unit that runs a layer."""
        return self.stamped.units[self.stamped.sequence[layer]]

    def item(self, layer: int, index: int, value: str | None) -> Any:
        """A piece's weights in order (`value` None), an op's layer object, or another object that it is given."""
        step = self.unit_of(layer).steps[index]
        if value is None:
            return tuple(self.fixed(layer, name, ref) for name, ref in step.inputs.items() if self.is_fixed(ref))
        if isinstance(step.step, OpStep) and value == step.step.args[0].name:
            return self.layer_object(layer, step)
        return self.fixed(layer, value, step.inputs[value])

    def layer_object(self, layer: int, step: UnitStep) -> Any:
        """The layer that an op is called for."""
        assert isinstance(step.step, OpStep)
        handle, *rest = step.step.args
        found = self.fixed(layer, handle.name, step.inputs[handle.name])
        find, _ = step.step.op.resolve(step.step.overload, (found, *rest))
        return find()

    def is_fixed(self, ref: Reference) -> bool:
        """Whether the reference is to an object that is bound, and not to a local."""
        return isinstance(ref, Own) or (isinstance(ref, Outside) and ref.name not in self.emitter.locals)

    def fixed(self, layer: int, name: str, ref: Reference) -> Any:
        """A bound object."""
        return self.bind(layer, ref) if isinstance(ref, Own) else self.emitter.bound[name]

    # -- one unit ---------------------------------------------------------------------------------------------

    def unit(self, layer: int, followers: Sequence[Unit], header: Header | None) -> None:
        """Write one unit; `header` names the items of a loop's row, None outside loops."""
        unit = self.unit_of(layer)
        moved = self.move_aside(unit)
        wanted = _previous(followers)
        if not followers:
            wanted |= {(ref.step, ref.slot) for ref in self.stamped.outputs if isinstance(ref, Local)}
        for index, step in enumerate(unit.steps):
            targets = [self.slot((index, at), name) if name else None for at, name in enumerate(step.step.outputs)]
            self.step(layer, index, step, targets, moved, header)
            dead = [*self.dead(unit, index, wanted, moved)]
            if header is None:
                dead += self.dead_outside(layer, unit, index)
            self.emitter.delete(dead)

    def step(
        self,
        layer: int,
        index: int,
        step: UnitStep,
        targets: Sequence[str | None],
        moved: Mapping[Slot, str],
        header: Header | None,
    ) -> None:
        """Write one step."""
        header = header or {}

        def reference(value: str) -> str:
            ref = step.inputs[value]
            if isinstance(ref, Previous) and (ref.step, ref.slot) in moved:
                return moved[ref.step, ref.slot]
            if self.is_fixed(ref):
                return header.get((index, value)) or self.emitter.give("VALUE", self.fixed(layer, value, ref))
            return self.name(ref)

        if isinstance(step.step, Piece):
            assert step.found is not None
            arguments = [reference(value) for value, ref in step.inputs.items() if not self.is_fixed(ref)]
            if len(arguments) < len(step.inputs):
                name = header.get((index, None)) or self.emitter.give("WEIGHTS", self.item(layer, index, None))
                arguments.append(f"*{name}")
            self.emitter.call_piece(step.step, step.found, arguments, [target or "_" for target in targets])
        else:
            handle, *rest = step.step.args
            name = header.get((index, handle.name)) or self.emitter.give("LAYER", self.layer_object(layer, step))
            arguments = [self.emitter.expression(arg, reference) for arg in rest]
            self.emitter.call_op(step.step, name, arguments, targets)

    def move_aside(self, unit: Unit) -> dict[Slot, str]:
        """Save what the unit still reads from the one before it after a step has given the same local a new value."""
        moved: dict[Slot, str] = {}
        for index, step in enumerate(unit.steps):
            for ref in step.wiring:
                if isinstance(ref, Previous) and ref.step < index and (ref.step, ref.slot) not in moved:
                    outputs = unit.steps[ref.step].step.outputs
                    if ref.slot < len(outputs) and outputs[ref.slot] is not None:
                        name = self.slots[ref.step, ref.slot]
                        moved[ref.step, ref.slot] = kept = self.emitter.fresh(name)
                        self.emitter.line(f"{kept} = {name}")
        return moved

    def dead(self, unit: Unit, index: int, wanted: set[Slot], moved: Mapping[Slot, str]) -> Iterable[str]:
        """Locals that no step reads after step `index`."""
        later = [ref for step in unit.steps[index + 1 :] for ref in step.wiring]
        here = unit.steps[index]
        made_here = {(index, at) for at, name in enumerate(here.step.outputs) if name is not None}
        for slot in {(ref.step, ref.slot) for ref in here.wiring if isinstance(ref, Local)} | made_here:
            if slot not in wanted and not any(isinstance(r, Local) and (r.step, r.slot) == slot for r in later):
                yield self.slots[slot]
        for slot in {(ref.step, ref.slot) for ref in here.wiring if isinstance(ref, Previous)}:
            if any(isinstance(r, Previous) and (r.step, r.slot) == slot for r in later):
                continue
            if slot in moved:
                yield moved[slot]
            elif slot not in made_here:  # a step that reads a local and gives it a new value has replaced it already
                yield self.slots[slot]

    def dead_outside(self, layer: int, unit: Unit, index: int) -> Iterable[str]:
        """Locals from before the stack that no step reads after step `index` of this layer, outside loops."""
        if not self.readers:
            for place, number in enumerate(self.stamped.sequence):
                for step in self.stamped.units[number].steps:
                    self.readers |= {ref.name: place for ref in step.wiring if isinstance(ref, Outside)}
            self.readers |= {ref.name: -1 for ref in self.stamped.outputs if isinstance(ref, Outside)}
        later = {ref for step in unit.steps[index + 1 :] for ref in step.wiring}
        for ref in set(unit.steps[index].wiring) - later:
            if isinstance(ref, Outside) and ref.name in self.emitter.locals and self.readers[ref.name] == layer:
                yield self.emitter.locals[ref.name]

    def slot(self, slot: Slot, value: str) -> str:
        """The local of an output, by its place in a unit."""
        if slot not in self.slots:
            self.slots[slot] = self.emitter.fresh(value)
        return self.slots[slot]

    def name(self, ref: Reference) -> str:
        """The local, or the global of a bound object, that a reference means."""
        if isinstance(ref, (Local, Previous)):
            return self.slots[ref.step, ref.slot]
        assert isinstance(ref, Outside)
        return self.emitter.reference(ref.name)


def _previous(units: Iterable[Unit]) -> set[Slot]:
    """The outputs of the unit before them that units read."""
    return {
        (ref.step, ref.slot)
        for unit in units
        for step in unit.steps
        for ref in step.wiring
        if isinstance(ref, Previous)
    }
