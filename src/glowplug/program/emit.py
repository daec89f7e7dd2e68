"""Writes a program's Python text: flat, one line a step, the objects that it names bound as globals."""

from __future__ import annotations

import itertools
import linecache
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from keyword import iskeyword
from typing import Any

from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.split import OpStep, Piece, Step, Value
from glowplug.graph.stamp import reads
from glowplug.layers.handle import LayerHandle
from glowplug.ops.layer_op import known_layer_ops
from glowplug.program.program import Program

Runners = Mapping[Fingerprint, Callable[..., Any]]
"""The callable of each distinct piece."""

_numbers = itertools.count(1)
_GLOBALS = re.compile(r"piece(_\w*)?$|run$")


@dataclass
class Emitter:
    """Writes the text and collects the objects that it names.

    Attributes:
        bound: graph value -> object, for weights, handles and whatever else does not change from call to call.
        runners: the callable of each distinct piece.
    """

    bound: Mapping[str, Any]
    runners: Runners
    locals: dict[str, str] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    indent: str = "    "
    _names: dict[int, str] = field(default_factory=dict)
    _count: dict[str, int] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=lambda: {op.fn.__name__ for op in known_layer_ops()})

    def line(self, text: str) -> None:
        """Add one line of the body."""
        self.lines.append(self.indent + text)

    def give(self, prefix: str, value: Any) -> str:
        """A global name for an object, in capitals and the same one each time."""
        name = self._names.get(id(value))
        if name is None:
            number = self._count.get(prefix, 0)
            self._count[prefix] = number + 1
            name = self._names[id(value)] = f"{prefix}_{number}"
            self.objects[name] = value
        return name

    def piece(self, found: Fingerprint) -> str:
        """The global name of a compiled piece: `piece_a`, `piece_b`, in the order of first use."""
        runner = self.runners[found]
        if id(runner) not in self._names:
            name = f"piece_{letters(self._count.get('piece', 0))}"
            self._count["piece"] = self._count.get("piece", 0) + 1
            self._names[id(runner)] = name
            self.objects[name] = runner
        return self._names[id(runner)]

    def op(self, function: Callable[..., Any]) -> str:
        """The global name of an op's function: its own."""
        name = function.__name__
        if self.objects.setdefault(name, function) is not function:
            return self.give(name, function)
        return name

    def local(self, value: str) -> str:
        """The local variable that holds a graph value."""
        if value not in self.locals:
            self.locals[value] = self.fresh(value)
        return self.locals[value]

    def fresh(self, value: str) -> str:
        """An unused local name, after a graph value's own."""
        stem = re.sub(r"(_\d+)+$", "", value.removeprefix("l_").rstrip("_"))
        if not stem.isidentifier() or len(stem) > 32 or not stem.islower() or _GLOBALS.match(stem) or iskeyword(stem):
            stem = "v"
        name, number = stem, 1
        while name in self._taken:
            number += 1
            name = f"{stem}_{number}"
        self._taken.add(name)
        return name

    def reference(self, value: str) -> str:
        """A graph value in the text: a local, or a global that holds a bound object."""
        return self.locals.get(value) or self.give("VALUE", self.bound[value])

    def expression(self, arg: Any, reference: Callable[[str], str]) -> str:
        """An op's argument in the text."""
        if isinstance(arg, Value):
            return reference(arg.name)
        if isinstance(arg, (list, tuple)):
            inside = ", ".join(self.expression(item, reference) for item in arg)
            return f"[{inside}]" if isinstance(arg, list) else f"({inside}{',' if len(arg) == 1 else ''})"
        if arg is None or isinstance(arg, (bool, int, float, str)):
            return repr(arg)
        return self.give("CONSTANT", arg)

    def call_piece(self, piece: Piece, found: Fingerprint, arguments: Sequence[str], targets: Sequence[str]) -> None:
        """One line that runs a piece."""
        call = f"{self.piece(found)}({', '.join(arguments)})"
        self.line(f"{', '.join(targets)}{',' if len(targets) == 1 else ''} = {call}" if targets else call)

    def call_op(self, step: OpStep, layer: str, rest: Sequence[str], targets: Sequence[str | None]) -> None:
        """One line that runs an op's function on its layer object."""
        call = f"{self.op(step.op.fn)}({', '.join([layer, *rest])})"
        if step.single:
            self.line(f"{targets[0]} = {call}" if targets[0] else call)
        else:
            names = [target or "_" for target in targets]
            self.line(f"{', '.join(names)}{',' if len(names) == 1 else ''} = {call}")

    def delete(self, names: Iterable[str]) -> None:
        """One line that drops locals, so that their memory is free for the next step."""
        dead = sorted(set(names))
        if dead:
            self.line(f"del {', '.join(dead)}")

    def finish(self, parameters: Sequence[str], returned: Sequence[str], arguments: Mapping[str, str]) -> Program:
        """Compile the text."""
        result = "".join(f"{name}, " for name in returned)
        text = "\n".join([f"def run({', '.join(parameters)}):", *self.lines, f"    return ({result})", ""])
        filename = f"<glowplug program {next(_numbers)}>"
        names = dict(self.objects)
        exec(compile(text, filename, "exec"), names)
        linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
        weakref.finalize(names["run"], linecache.cache.pop, filename, None).atexit = False
        return Program(names["run"], tuple(arguments.values()), text, self.objects)


def letters(number: int) -> str:
    """0 -> a, 25 -> z, 26 -> aa."""
    name = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        name = chr(ord("a") + digit) + name
    return name


def emit(
    steps: Sequence[Step],
    prints: Sequence[Fingerprint | None],
    runners: Runners,
    outputs: Sequence[str],
    arguments: Mapping[str, str],
    bound: Mapping[str, Any],
) -> Program:
    """Bind the steps of a full trace into a program.

    Args:
        steps: pieces and op steps in order.
        prints: the fingerprint of each piece; None for an op step.
        runners: the callable of each distinct piece.
        outputs: graph values to return.
        arguments: graph value -> its source, for what is handed in at each call, in call order.
        bound: graph value -> object, for weights and handles.
    """
    emitter = Emitter(bound, runners)
    parameters = [emitter.local(value) for value in arguments]
    emit_steps(emitter, steps, prints, kept=set(outputs))
    return emitter.finish(parameters, [emitter.reference(value) for value in outputs], arguments)


def emit_steps(emitter: Emitter, steps: Sequence[Step], prints: Sequence[Fingerprint | None], kept: set[str]) -> None:
    """Write steps one after the other; values that no step reads any more are dropped, but for those `kept`."""
    last_use = _last_use(steps, kept)
    for index, (step, found) in enumerate(zip(steps, prints, strict=True)):
        if isinstance(step, Piece):
            assert found is not None
            parts = [emitter.locals[value] for value in step.inputs if value in emitter.locals]
            fixed = tuple(emitter.bound[value] for value in step.inputs if value not in emitter.locals)
            if fixed:
                parts.append(f"*{emitter.give('WEIGHTS', fixed)}")
            emitter.call_piece(step, found, parts, [emitter.local(value) for value in step.outputs])
        else:
            layer, rest = find_layer(emitter, step, emitter.bound)
            targets = [emitter.local(value) if value else None for value in step.outputs]
            emitter.call_op(step, layer, [emitter.expression(arg, emitter.reference) for arg in rest], targets)
        dead = [emitter.locals[value] for value, at in last_use.items() if at == index and value in emitter.locals]
        emitter.delete(dead)


def find_layer(emitter: Emitter, step: OpStep, bound: Mapping[str, Any]) -> tuple[str, Sequence[Any]]:
    """The text for an op's layer, and the arguments left. The layer is looked up at each call, and not held: torch
    keeps what it compiled longer than the model lives."""
    first, *rest = step.args
    if isinstance(first, Value):
        first = bound[first.name]
        assert isinstance(first, LayerHandle)
    resolve, left = step.op.resolve(step.overload, (first, *rest))
    ordered = step.overload is step.op.overloads["ordered"]
    return f"{emitter.give('NEXT_LAYER' if ordered else 'LAYER', resolve)}()", left


def _last_use(steps: Sequence[Step], kept: set[str]) -> dict[str, int]:
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        for name in (*reads(step), *(out for out in step.outputs if out)):
            last[name] = index
    for name in kept:
        last.pop(name, None)
    return last
