"""Writes a program's Python text: one line per step, a `del` for dead values, a `for` loop over repeating layers.

The steps of the deep model are flat. A layer's lines name its outputs by their place in the layer, and leave a hole for
each bound object. Where the lines of several layers are equal, they are written once, in a loop over rows that hold the
objects for the holes.
"""

from __future__ import annotations

import itertools
import linecache
import math
import re
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any, NamedTuple

from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.split import OpStep, Step, Value
from glowplug.graph.stamp import Own
from glowplug.layers.handle import LayerHandle
from glowplug.program.program import Program, piece_name

_LONGEST_PERIOD = 16
_HOLE = "\0"
_numbers = itertools.count(1)

Slots = Mapping[Fingerprint, Callable[..., Any]]
"""The callable of each distinct piece."""
Find = Callable[[int, Own], Any]
"""`find(layer, own)`: the object that a layer of the deep model has at a path."""
Wrap = Callable[[int, Callable[..., Any]], Callable[..., Any]]
"""`wrap(index, run)`: what the step at an index calls in the place of its slot's callable, for what belongs to a single
step, such as a CUDA graph. The program then does not read its slots."""
Key = str | tuple[int, int, int]
"""A value computed at run time: its graph name, or for a layer's value (layer, step, index of the output)."""


@dataclass(frozen=True)
class DeepStep:
    """One step of the deep model.

    Attributes:
        step: the template's piece or op step.
        slot: the piece's fingerprint; None for an op.
        inputs: graph value -> its source: a value, the name of an object outside the stack, or one of the layer's own.
        outputs: the values that it computes; None for one that nothing reads.
        layer: the layer in whose unit it runs; None before the stack and in a full trace.
    """

    step: Step
    slot: Fingerprint | None
    inputs: Mapping[str, Key | Own]
    outputs: Sequence[Key | None]
    layer: int | None = None


def write_program(
    steps: Sequence[DeepStep],
    outputs: Sequence[Key],
    arguments: Mapping[str, str],
    slots: Slots,
    values: Mapping[str, Any],
    find: Find | None,
    wrap: Wrap | None = None,
) -> Program:
    """Write the program that runs `steps` and returns `outputs`; other arguments as for `Plan.write`."""
    distinct = list(dict.fromkeys(deep.slot for deep in steps if deep.slot is not None))
    pieces = {slot: piece_name(number) for number, slot in enumerate(distinct)}
    wrapped = {}
    if wrap is not None:
        pairs = ((index, deep.slot) for index, deep in enumerate(steps))
        wrapped = {index: wrap(index, slots[slot]) for index, slot in pairs if slot is not None}
    writer = _Writer(steps, outputs, pieces, values, find, wrapped)
    parameters = [writer.hold(name, writer.place(name, name)) for name in arguments]
    body = writer.layers(steps, [writer.step(index, deep) for index, deep in enumerate(steps)])
    returned = [writer.local[key] if key in writer.local else writer.outside(str(key)) for key in outputs]
    if pieces and wrap is None:
        body.insert(0, f"{_targets(list(pieces.values()))} = slots")
    head = f"def run({', '.join(['slots', *parameters])}):"
    text = "\n    ".join([head, *body, f"return {_targets(returned) or '()'}"]) + "\n"
    code = _compile(text, writer.bound)
    return Program(code, {slot: slots[slot] for slot in pieces}, tuple(arguments.values()), text, writer.bound)


def _compile(text: str, names: Mapping[str, Any]) -> Callable[..., tuple[Any, ...]]:
    """Compile the text's function. Tracebacks show its lines as long as the function lives."""
    filename = f"<glowplug program {next(_numbers)}>"
    table = dict(names)
    exec(compile(text, filename, "exec"), table)
    code: Callable[..., tuple[Any, ...]] = table.pop("run")
    linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
    weakref.finalize(code, linecache.cache.pop, filename, None).atexit = False
    return code


class _Object(NamedTuple):
    """A bound object for a hole, a stem for its name, and a key that identifies the object."""

    value: Any
    stem: str
    key: Any


@dataclass(frozen=True)
class _Lines:
    """The text of one step with a hole for each of `objects`, and the locals that no later step reads. Those assigned
    before the stack are in `dead_outside`: a loop must not delete them before it ends."""

    text: str
    objects: Sequence[_Object]
    dead: Sequence[str]
    dead_outside: Sequence[str]


class _Writer:
    """Writes steps, and tracks what locals hold and what globals are bound to.

    Attributes:
        bound: the object that each global is bound to.
        local: the local that currently holds each value.
    """

    def __init__(
        self,
        steps: Sequence[DeepStep],
        outputs: Sequence[Key],
        pieces: Mapping[Fingerprint, str],
        values: Mapping[str, Any],
        find: Find | None,
        wrapped: Mapping[int, Callable[..., Any]],
    ) -> None:
        self.bound: dict[str, Any] = {}
        self.local: dict[Key | Own | None, str] = {}
        self._pieces, self._values, self._find, self._wrapped = pieces, values, find, wrapped
        self._holds: dict[str, Key] = {}
        self._places: dict[Any, str] = {}
        self._globals: dict[Any, str] = {}
        self._taken = {"run", "slots", "_", *pieces.values()}
        self._count: Counter[str] = Counter()
        self._ops = {deep.step.op: "" for deep in steps if isinstance(deep.step, OpStep)}
        for op in self._ops:
            name = op.fn.__name__
            self._ops[op] = self._fresh(name if name.isidentifier() and not iskeyword(name) else "op")
            self.bound[self._ops[op]] = op.fn
        self._last: dict[Key | Own | None, int] = {}
        for index, deep in enumerate(steps):
            self._last |= dict.fromkeys((*deep.inputs.values(), *deep.outputs), index)
        self._last |= dict.fromkeys(outputs, len(steps))

    # -- names ------------------------------------------------------------------------------------------------

    def _fresh(self, stem: str) -> str:
        """An unused name: `stem`, `stem_2`, `stem_3`, ..."""
        name = stem
        while name in self._taken:
            self._count[stem] += 1
            name = f"{stem}_{self._count[stem] + 1}"
        self._taken.add(name)
        return name

    def _global(self, item: _Object) -> str:
        """The global of an object, always the same one."""
        if item.key not in self._globals:
            self._globals[item.key] = self._fresh(item.stem.upper())
            self.bound[self._globals[item.key]] = item.value
        return self._globals[item.key]

    def outside(self, name: str) -> str:
        """The global of an object outside the stack."""
        return self._global(_Object(self._values[name], "value", id(self._values[name])))

    def place(self, place: Any, name: str) -> str:
        """The local of a place, named after its first value."""
        if place not in self._places:
            self._places[place] = self._fresh(_stem(name))
        return self._places[place]

    def hold(self, key: Key, local: str) -> str:
        """Record that a local holds a value from now on."""
        self.local[key], self._holds[local] = local, key
        return local

    # -- steps ------------------------------------------------------------------------------------------------

    def step(self, index: int, deep: DeepStep) -> _Lines:
        """The lines of the step at `index`."""
        objects: list[_Object] = []
        if isinstance(deep.step, OpStep):
            call = self._call_op(deep, deep.step, objects)
        else:
            call = self._call(index, deep, objects)
        lines: list[str] = []
        targets: list[str] = []
        for key, name in zip(deep.outputs, deep.step.outputs, strict=True):
            if key is None or name is None or self._last[key] == index:
                targets.append("_")
                continue
            local = self.place(key if isinstance(key, str) else key[1:], name)
            lines += self._vacate(local, index)
            targets.append(self.hold(key, local))
        dead: list[str] = []
        dead_outside: list[str] = []
        if set(targets) - {"_"}:
            dead += {"_"} & set(targets)
            single = isinstance(deep.step, OpStep) and deep.step.single
            call = f"{targets[0] if single else _targets(targets)} = {call}"
        for read in {*deep.inputs.values(), *deep.outputs}:
            if read in self.local and self._last[read] == index:
                local = self.local.pop(read)
                if self._holds[local] == read:  # unless it already holds an output of this step
                    del self._holds[local]
                    (dead_outside if isinstance(read, str) and deep.layer is not None else dead).append(local)
        return _Lines("\n".join([*lines, call]), objects, sorted(dead), dead_outside)

    def _vacate(self, local: str, index: int) -> list[str]:
        """The lines that move a local's value to another local, if a later step reads it."""
        value = self._holds.get(local)
        if value is None or self._last[value] <= index:
            return []
        spare = self.place(("aside", local), local)
        lines = self._vacate(spare, index)
        return [*lines, f"{self.hold(value, spare)} = {local}"]

    def _call(self, index: int, deep: DeepStep, objects: list[_Object]) -> str:
        """The call of a piece, with adjacent bound objects unpacked from one tuple."""
        assert deep.slot is not None
        piece = self._pieces[deep.slot]
        if index in self._wrapped:
            objects.append(_Object(self._wrapped[index], piece, index))
            piece = _HOLE
        arguments: list[str] = []
        for is_local, group in itertools.groupby(deep.inputs.values(), self.local.__contains__):
            if is_local:
                arguments += [self.local[source] for source in group]
            else:
                weights = tuple([self._fixed(deep, source) for source in group])
                objects.append(_Object(weights, "weights", tuple(map(id, weights))))
                arguments.append(f"*{_HOLE}")
        return f"{piece}({', '.join(arguments)})"

    def _call_op(self, deep: DeepStep, step: OpStep, objects: list[_Object]) -> str:
        """The call of an op's function on its layer object. A stamped program is bound to the object; a full trace
        looks it up at each call, since torch may keep the program longer than the model lives."""
        first, *rest = step.args
        if isinstance(first, Value):
            first = self._fixed(deep, deep.inputs[first.name])
            assert isinstance(first, LayerHandle)
        find, left = step.op.resolve(step.overload, (first, *rest))
        if deep.layer is not None:
            layer = find()
            objects.append(_Object(layer, "layer", id(layer)))
        elif step.overload is step.op.overloads["ordered"]:
            objects.append(_Object(find, "next_layer", (step.op, first)))
        else:
            objects.append(_Object(find, "layer", ("layer", first)))
        arguments = [self._expression(deep, arg, objects) for arg in left]
        return f"{self._ops[step.op]}({', '.join([_HOLE if deep.layer is not None else f'{_HOLE}()', *arguments])})"

    def _expression(self, deep: DeepStep, arg: Any, objects: list[_Object]) -> str:
        """The text of an op's argument."""
        if isinstance(arg, (list, tuple)):
            items = ", ".join(self._expression(deep, item, objects) for item in arg)
            return f"[{items}]" if isinstance(arg, list) else f"({items}{',' if len(arg) == 1 else ''})"
        if arg is None or type(arg) in (bool, int, str) or (type(arg) is float and math.isfinite(arg)):
            return repr(arg)
        stem = "constant"
        if isinstance(arg, Value):
            source = deep.inputs[arg.name]
            if source in self.local:
                return self.local[source]
            arg, stem = self._fixed(deep, source), _stem(source.path) if isinstance(source, Own) else "value"
        objects.append(_Object(arg, stem, id(arg)))
        return _HOLE

    def _fixed(self, deep: DeepStep, source: Key | Own) -> Any:
        """The object that a step is bound to."""
        if isinstance(source, Own):
            assert self._find is not None and deep.layer is not None
            return self._find(deep.layer, source)
        assert isinstance(source, str)
        return self._values[source]

    # -- layers -----------------------------------------------------------------------------------------------

    def layers(self, steps: Sequence[DeepStep], lines: Sequence[_Lines]) -> list[str]:
        """The text of all steps: first those before the stack, then the layers, with a loop where they repeat."""
        blocks: dict[int | None, list[_Lines]] = {}
        for deep, line in zip(steps, lines, strict=True):
            blocks.setdefault(deep.layer, []).append(line)
        body = self._block([blocks.pop(None, [])], "")
        layers = list(blocks.values())
        for run in fold([[(line.text, line.dead) for line in block] for block in layers]):
            last = run.start + run.period * run.times - 1
            starts = range(run.start, last + 1, run.period)
            at_a_time = f", {run.period} at a time" if run.period > 1 else ""
            body.append(f"# layers {run.start} to {last}{at_a_time}" if run.times > 1 else f"# layer {run.start}")
            repeats = [list(itertools.chain(*layers[start : start + run.period])) for start in starts]
            body += self._block(repeats, f"LAYERS_{run.start}_TO_{last}")
        return body

    def _block(self, repeats: Sequence[Sequence[_Lines]], table: str) -> list[str]:
        """The text of steps; if they repeat, a loop over rows of the objects that differ."""
        variables: dict[Any, str] = {}
        columns: list[list[Any]] = []
        names: list[str] = []
        for hole in zip(*([item for line in lines for item in line.objects] for lines in repeats), strict=True):
            keys = tuple(item.key for item in hole)
            if len(set(keys)) == 1:
                names.append(self._global(hole[0]))
                continue
            if keys not in variables:
                variables[keys] = self._fresh(hole[0].stem)
                columns.append([item.value for item in hole])
            names.append(variables[keys])
        hole_names, once = iter(names), len(repeats) == 1
        body: list[str] = []
        for line in repeats[0]:
            body += re.sub(_HOLE, lambda _: next(hole_names), line.text).split("\n")
            body += _delete([*line.dead, *line.dead_outside] if once else line.dead)
        if once:
            return body
        rows = self._fresh(table)
        self.bound[rows] = tuple(zip(*columns, strict=True)) if columns else ((),) * len(repeats)
        dead = [local for lines in repeats for line in lines for local in line.dead_outside]
        loop = f"for {_targets(list(variables.values())) or '_'} in {rows}:"
        return [loop, *(f"    {text}" for text in body), *_delete(dead)]


@dataclass(frozen=True)
class Run:
    """A part of a sequence: `times` repetitions of `period` items, beginning at index `start`."""

    start: int
    period: int
    times: int


def fold(sequence: Sequence[Any]) -> list[Run]:
    """Find the repetitions in a sequence; items that repeat less than three times are runs of their own."""
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


def _stem(value: str) -> str:
    """The stem of a local's name, from the name of a graph value or the path of an attribute."""
    stem = re.sub(r"(_\d+)+$", "", value.rpartition(".")[2].removeprefix("l_").rstrip("_"))
    usable = stem.isidentifier() and stem.isascii() and stem.islower() and not iskeyword(stem)
    return stem if usable and len(stem) <= 32 else "value"


def _targets(names: Sequence[str]) -> str:
    return f"({names[0]},)" if len(names) == 1 else ", ".join(names)


def _delete(names: Collection[str]) -> list[str]:
    """The line that deletes locals, so that their memory is free for the next step."""
    return [f"del {', '.join(sorted(names))}"] if names else []
