"""Writes a program's Python text: one line a step, dead values dropped, repeating layers a `for` loop.

The steps of the deep model are flat. Each layer's lines name its outputs by their place in the layer, and leave a hole
for each object that is bound; where the lines of layers repeat, they are written once, and a loop's rows hold what goes
into the holes.
"""

from __future__ import annotations

import itertools
import linecache
import math
import re
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any

from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.split import OpStep, Step, Value
from glowplug.graph.stamp import Bind, Own
from glowplug.layers.handle import LayerHandle
from glowplug.program.program import Program, piece_name

_LONGEST_PERIOD = 16
_HOLE = "\0"
_numbers = itertools.count(1)

Slots = Mapping[Fingerprint, Callable[..., Any]]
"""The callable of each distinct piece."""
Key = str | tuple[int, int, int]
"""A value that changes from call to call: its name in the graph; a layer's by layer, step, place among its outputs."""


@dataclass(frozen=True)
class DeepStep:
    """One step of the deep model.

    Attributes:
        step: the template's piece or op step.
        slot: the piece's fingerprint; None for an op.
        inputs: graph value -> where it comes from: a value, an object from outside the stack by its name, or one of
            the layer's own.
        outputs: the values that it makes; None for one that nothing reads.
        layer: the layer in whose unit it runs; None before the stack, and in a full trace.
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
    bind: Bind | None,
) -> Program:
    """Write a program.

    Args:
        steps: the steps of the deep model.
        outputs: the values to return.
        arguments: graph value -> its source, for what is handed in at each call, in call order.
        slots: the callable of each distinct piece.
        values: graph value -> object, for what is bound and lies outside the stack.
        bind: finds the object that a layer has at a path.
    """
    pieces = {slot: piece_name(n) for n, slot in enumerate(dict.fromkeys(s.slot for s in steps if s.slot is not None))}
    objects = _Objects({"run", "slots", "_", *pieces.values()})
    writer = _StepWriter(steps, outputs, pieces, objects, values, bind)
    parameters = [writer.assign(name, name) for name in arguments]
    lines = [writer.write(index, deep) for index, deep in enumerate(steps)]
    body = [f"def run({', '.join(['slots', *parameters])}):"]
    if pieces:
        body.append(f"    {_targets(list(pieces.values()))} = slots")
    body += _fold(steps, lines, objects)
    returned = [writer.local[key] if key in writer.local else objects.name(writer.outside(str(key))) for key in outputs]
    text = "\n".join([*body, f"    return {_targets(returned) or '()'}", ""])
    code = _compile(text, objects.bound)
    return Program(code, {slot: slots[slot] for slot in pieces}, tuple(arguments.values()), text, objects.bound)


def _compile(text: str, names: Mapping[str, Any]) -> Callable[..., tuple[Any, ...]]:
    """The text's function; tracebacks show its lines for as long as it lives."""
    filename = f"<glowplug program {next(_numbers)}>"
    table = dict(names)
    exec(compile(text, filename, "exec"), table)
    code: Callable[..., tuple[Any, ...]] = table.pop("run")
    linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
    weakref.finalize(code, linecache.cache.pop, filename, None).atexit = False
    return code


# -- names -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Object:
    """An object that a hole stands for.

    Attributes:
        stem: what to name it after.
        value: the object.
        key: equal for the same object.
    """

    stem: str
    value: Any
    key: Any


class _Objects:
    """Names of a program's text, each given once; and the objects that its globals are bound to.

    Args:
        taken: names that are given already.
    """

    def __init__(self, taken: set[str]) -> None:
        self.bound: dict[str, Any] = {}
        self._taken = taken
        self._next: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)
        self._numbered: Counter[str] = Counter()
        self._names: dict[Any, str] = {}

    def fresh(self, stem: str) -> str:
        """A new name: `stem`, `stem_2`, `stem_3`, ..."""
        numbers = self._next[stem]
        while True:
            number = next(numbers)
            name = f"{stem}_{number + 1}" if number else stem
            if name not in self._taken:
                self._taken.add(name)
                return name

    def bind(self, stem: str, value: Any) -> str:
        """A new global for an object."""
        name = self.fresh(stem)
        self.bound[name] = value
        return name

    def name(self, item: _Object) -> str:
        """The global of an object, the same one each time: `STEM_0`, `STEM_1`, ..."""
        if item.key not in self._names:
            stem = item.stem.upper()
            self._names[item.key] = self.bind(f"{stem}_{self._numbered[stem]}", item.value)
            self._numbered[stem] += 1
        return self._names[item.key]


def _stem(value: str) -> str:
    """What to name a local after: a graph value's own name, or the path of an attribute."""
    stem = re.sub(r"(_\d+)+$", "", value.rpartition(".")[2].removeprefix("l_").rstrip("_"))
    return stem if stem.isidentifier() and len(stem) <= 32 and stem.islower() and not iskeyword(stem) else "value"


def _targets(names: Sequence[str]) -> str:
    return f"({names[0]},)" if len(names) == 1 else ", ".join(names)


# -- steps -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lines:
    """The text of one step, with a hole for each of `objects`.

    Attributes:
        text: its lines.
        dead: locals that no later step reads.
        dead_outside: the same, but made before the stack: in a loop, they must live until it ends.
    """

    text: tuple[str, ...]
    objects: tuple[_Object, ...]
    dead: tuple[str, ...]
    dead_outside: tuple[str, ...]


class _StepWriter:
    """Writes one step after the other, and keeps account of which local holds what."""

    def __init__(
        self,
        steps: Sequence[DeepStep],
        outputs: Sequence[Key],
        pieces: Mapping[Fingerprint, str],
        objects: _Objects,
        values: Mapping[str, Any],
        bind: Bind | None,
    ) -> None:
        self.pieces, self.objects, self.values, self.bind = pieces, objects, values, bind
        self.local: dict[Key | Own, str] = {}
        self._holds: dict[str, Key] = {}
        self._names: dict[Any, str] = {}
        self._aside: defaultdict[str, list[str]] = defaultdict(list)
        ops = dict.fromkeys(deep.step.op for deep in steps if isinstance(deep.step, OpStep))
        self._functions = {op: objects.bind(_function_name(op.fn), op.fn) for op in ops}
        self._last: dict[Key, int] = {}
        for index, deep in enumerate(steps):
            for key in (*deep.inputs.values(), *deep.outputs):
                if key is not None and not isinstance(key, Own):
                    self._last[key] = index
        self._last.update(dict.fromkeys(outputs, len(steps)))
        self._dying: defaultdict[int, list[Key]] = defaultdict(list)
        for key, index in self._last.items():
            self._dying[index].append(key)

    def assign(self, key: Key, name: str) -> str:
        """The local that is to hold a value from now on: that of its place in the layer."""
        place = key if isinstance(key, str) else key[1:]
        if place not in self._names:
            self._names[place] = self.objects.fresh(_stem(name))
        local = self.local[key] = self._names[place]
        self._holds[local] = key
        return local

    def outside(self, name: str) -> _Object:
        """A bound object from outside the stack."""
        return _Object("value", self.values[name], id(self.values[name]))

    def write(self, index: int, deep: DeepStep) -> _Lines:
        """The lines of the step at `index`."""
        objects: list[_Object] = []
        call = self._piece(deep, objects) if deep.slot is not None else self._op(deep, objects)
        made = [key if key is not None and self._last[key] > index else None for key in deep.outputs]
        text = [self._move_aside(key, index) for key in made if key is not None]
        names = zip(made, deep.step.outputs, strict=True)
        targets = [self.assign(key, name) if key is not None and name else "_" for key, name in names]
        if made != [None] * len(made):
            call = f"{targets[0] if isinstance(deep.step, OpStep) and deep.step.single else _targets(targets)} = {call}"
        else:
            targets = []
        dead = ["_"] if "_" in targets else []
        dead_outside: list[str] = []
        for key in self._dying[index]:
            local = self.local.pop(key, None)
            if local is not None and self._holds[local] == key:  # it may hold an output of this step by now
                del self._holds[local]
                (dead_outside if isinstance(key, str) and deep.layer is not None else dead).append(local)
        return _Lines((*filter(None, text), call), tuple(objects), tuple(sorted(dead)), tuple(dead_outside))

    def _move_aside(self, key: Key, index: int) -> str | None:
        """The line that saves what the local of a new value still holds, where a later step reads that."""
        local = self._names.get(key if isinstance(key, str) else key[1:])
        held = self._holds.get(local) if local is not None else None
        if local is None or held is None or self._last[held] <= index:
            return None
        spare = next((name for name in self._aside[local] if name not in self._holds), None)
        if spare is None:
            spare = self.objects.fresh(local)
            self._aside[local].append(spare)
        self.local[held], self._holds[spare] = spare, held
        return f"{spare} = {local}"

    def _piece(self, deep: DeepStep, objects: list[_Object]) -> str:
        """The call of a piece, its bound objects as one tuple."""
        assert deep.slot is not None
        arguments: list[str] = []
        for is_local, group in itertools.groupby(deep.inputs.values(), self.local.__contains__):
            if is_local:
                arguments += [self.local[source] for source in group]
            else:
                fixed = tuple([self._fixed(deep, source) for source in group])
                objects.append(_Object("weights", fixed, tuple(map(id, fixed))))
                arguments.append(f"*{_HOLE}")
        return f"{self.pieces[deep.slot]}({', '.join(arguments)})"

    def _op(self, deep: DeepStep, objects: list[_Object]) -> str:
        """The call of an op's function on its layer object. A stamped program is bound to the object; a full trace
        looks it up at each call and does not hold it, as torch keeps what it compiled longer than the model lives."""
        step = deep.step
        assert isinstance(step, OpStep)
        first, *rest = step.args
        if isinstance(first, Value):
            first = self._fixed(deep, deep.inputs[first.name])
            assert isinstance(first, LayerHandle)
        find, left = step.op.resolve(step.overload, (first, *rest))
        if deep.layer is not None:
            layer = find()
            objects.append(_Object("layer", layer, id(layer)))
        elif step.overload is step.op.overloads["ordered"]:
            objects.append(_Object("next_layer", find, (step.op, first)))
        else:
            objects.append(_Object("layer", find, ("layer", first)))
        arguments = [f"{_HOLE}()" if deep.layer is None else _HOLE]
        arguments += [self._expression(deep, arg, objects) for arg in left]
        return f"{self._functions[step.op]}({', '.join(arguments)})"

    def _expression(self, deep: DeepStep, arg: Any, objects: list[_Object]) -> str:
        """An op's argument in the text."""
        if isinstance(arg, Value):
            source = deep.inputs[arg.name]
            if source in self.local:
                return self.local[source]
            value = self._fixed(deep, source)
            objects.append(_Object(_stem(source.path) if isinstance(source, Own) else "value", value, id(value)))
            return _HOLE
        if isinstance(arg, (list, tuple)):
            inside = ", ".join(self._expression(deep, item, objects) for item in arg)
            return f"[{inside}]" if isinstance(arg, list) else f"({inside}{',' if len(arg) == 1 else ''})"
        if arg is None or type(arg) in (bool, int, str) or (type(arg) is float and math.isfinite(arg)):
            return repr(arg)
        objects.append(_Object("constant", arg, id(arg)))
        return _HOLE

    def _fixed(self, deep: DeepStep, source: Key | Own) -> Any:
        """A bound object."""
        if isinstance(source, Own):
            assert self.bind is not None and deep.layer is not None
            return self.bind(deep.layer, source)
        assert isinstance(source, str)
        return self.values[source]


def _function_name(function: Callable[..., Any]) -> str:
    name = function.__name__
    return name if name.isidentifier() and not iskeyword(name) else "op"


# -- layers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A stretch of a sequence: `times` repetitions of `period` items, from the item at `start`."""

    start: int
    period: int
    times: int


def fold(sequence: Sequence[Any]) -> list[Run]:
    """Find the repetition in a sequence; what does not repeat at least three times stays as it is."""
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


def _fold(steps: Sequence[DeepStep], lines: Sequence[_Lines], objects: _Objects) -> list[str]:
    """The text of all steps: those before the stack, then layer after layer, repeating ones as a loop."""
    groups = itertools.groupby(zip(steps, lines, strict=True), lambda pair: pair[0].layer)
    blocks = {layer: [line for _, line in group] for layer, group in groups}
    body = [f"    {text}" for line in blocks.pop(None, []) for text in _filled(line, objects)]
    layers = list(blocks.values())
    numbers: dict[Any, int] = {}
    forms = [tuple((line.text, line.dead) for line in block) for block in layers]
    for run in fold([numbers.setdefault(form, len(numbers)) for form in forms]):
        if run.times == 1:
            body.append(f"    # layer {run.start}")
            body += [f"    {text}" for line in layers[run.start] for text in _filled(line, objects)]
        else:
            stop = run.start + run.period * run.times
            repeats = [
                [line for block in layers[start : start + run.period] for line in block]
                for start in range(run.start, stop, run.period)
            ]
            at_a_time = f", {run.period} at a time" if run.period > 1 else ""
            body.append(f"    # layers {run.start} to {stop - 1}{at_a_time}")
            body += [f"    {text}" for text in _loop(repeats, f"LAYERS_{run.start}_TO_{stop - 1}", objects)]
    return body


def _filled(line: _Lines, objects: _Objects) -> list[str]:
    """The lines of a step outside of loops."""
    text = _fill(line.text, iter([objects.name(item) for item in line.objects]))
    return [*text, *_delete([*line.dead, *line.dead_outside])]


def _loop(repeats: Sequence[Sequence[_Lines]], table: str, objects: _Objects) -> list[str]:
    """The lines of steps that repeat, as a loop over rows of what differs between the repetitions."""
    holes = list(zip(*([item for line in lines for item in line.objects] for lines in repeats), strict=True))
    variables: dict[tuple[Any, ...], str] = {}
    columns: list[Sequence[Any]] = []
    names = []
    for hole in holes:
        keys = tuple(item.key for item in hole)
        if len(set(keys)) == 1:
            names.append(objects.name(hole[0]))
            continue
        if keys not in variables:
            variables[keys] = objects.fresh(hole[0].stem)
            columns.append([item.value for item in hole])
        names.append(variables[keys])
    rows = tuple(zip(*columns, strict=True)) if columns else ((),) * len(repeats)
    name = objects.bind(table, rows)
    left = iter(names)
    body = [text for line in repeats[0] for text in (*_fill(line.text, left), *_delete(line.dead))]
    ended = {local for lines in repeats for line in lines for local in line.dead_outside}
    loop = f"for {_targets(list(variables.values())) or '_'} in {name}:"
    return [loop, *(f"    {text}" for text in body), *_delete(ended)]


def _fill(text: Iterable[str], names: Iterable[str]) -> list[str]:
    """Lines of text with names in their holes."""
    left = iter(names)
    return ["".join(part if part != _HOLE else next(left) for part in re.split(f"({_HOLE})", line)) for line in text]


def _delete(names: Iterable[str]) -> list[str]:
    """The line that drops locals, so that their memory is free for the next step."""
    return [f"del {', '.join(sorted(names))}"] if names else []
