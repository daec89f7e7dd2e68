"""A program: flat steps in generated Python, weights and layers bound, nothing looked up while it runs."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.split import OpStep, Piece, Step
from glowplug.layers.handle import LayerHandle


@dataclass(frozen=True)
class Program:
    """A runnable program.

    Attributes:
        run: `run(*arguments)` -> tuple of the graph's outputs. Arguments in the order of `arguments`.
        arguments: sources of what changes from call to call.
        source: the Python text that runs.
        outline: its steps, for reports.
    """

    run: Callable[..., tuple[Any, ...]]
    arguments: tuple[str, ...]
    source: str
    outline: tuple[StepOutline, ...] = ()


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


@dataclass
class _Emitter:
    """Writes the program's text and collects the objects that it names."""

    bound: Mapping[str, Any]
    names: dict[str, str] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def give(self, prefix: str, value: Any) -> str:
        """A global name for an object."""
        name = f"{prefix}{sum(key.startswith(prefix) for key in self.objects)}"
        self.objects[name] = value
        return name

    def local(self, value: str) -> str:
        """The local variable that holds a graph value."""
        return self.names.setdefault(value, f"v{len(self.names)}")


def emit(
    steps: Sequence[Step],
    runners: Sequence[Callable[..., Any] | None],
    outputs: Sequence[str],
    arguments: Mapping[str, str],
    bound: Mapping[str, Any],
) -> Program:
    """Bind steps into a program.

    Args:
        steps: pieces and op steps in order.
        runners: the compiled callable of each piece; None for an op step.
        outputs: graph values to return.
        arguments: graph value -> its source, for what is handed in at each call, in call order.
        bound: graph value -> object, for weights and handles.
    """
    emitter = _Emitter(bound)
    parameters = [emitter.local(value) for value in arguments]
    last_use = _last_use(steps, outputs)
    kinds: dict[int, str] = {}
    for index, (step, runner) in enumerate(zip(steps, runners, strict=True)):
        if isinstance(step, Piece):
            assert runner is not None
            name = kinds.get(id(runner))
            if name is None:
                name = kinds[id(runner)] = emitter.give("piece_", runner)
            _emit_piece(emitter, step, name)
        else:
            _emit_op(emitter, step)
        dead = [emitter.names[value] for value, at in last_use.items() if at == index and value in emitter.names]
        if dead:
            emitter.lines.append(f"    del {', '.join(sorted(dead))}")
    returned = "".join(f"{_reference(emitter, value)}, " for value in outputs)
    text = "\n".join([f"def run({', '.join(parameters)}):", *emitter.lines, f"    return ({returned})", ""])
    filename = f"<glowplug program {id(emitter):x}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
    exec(compile(text, filename, "exec"), emitter.objects)
    return Program(emitter.objects["run"], tuple(arguments.values()), text)


def _last_use(steps: Sequence[Step], outputs: Sequence[str]) -> dict[str, int]:
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        names = step.inputs if isinstance(step, Piece) else [node.name for node in _nodes(step.args)]
        for name in (*names, *(out for out in step.outputs if out)):
            last[name] = index
    for name in outputs:
        last.pop(name, None)
    return last


def _nodes(arg: Any) -> list[Any]:
    if isinstance(arg, (tuple, list)):
        return [node for item in arg for node in _nodes(item)]
    return [arg] if hasattr(arg, "all_input_nodes") else []


def _reference(emitter: _Emitter, value: str) -> str:
    """A graph value in the program's text: a local, or a global that holds a bound object."""
    return emitter.names.get(value) or emitter.give("w", emitter.bound[value])


def _emit_piece(emitter: _Emitter, piece: Piece, name: str) -> None:
    parts = [emitter.names[value] for value in piece.inputs if value in emitter.names]
    fixed = tuple(emitter.bound[value] for value in piece.inputs if value not in emitter.names)
    if fixed:
        parts.append(f"*{emitter.give('weights_', fixed)}")
    targets = "".join(f"{emitter.local(value)}, " for value in piece.outputs)
    call = f"{name}({', '.join(parts)})"
    emitter.lines.append(f"    {targets}= {call}" if targets else f"    {call}")


def _emit_op(emitter: _Emitter, step: OpStep) -> None:
    find_layer, rest = step.op.resolve(step.overload, _bind_identity(step, emitter.bound))
    if step.overload is step.op.overloads["ordered"]:
        layer = f"{emitter.give('next_layer_', find_layer)}()"
    else:
        layer = emitter.give("layer_", find_layer())
    operator = emitter.give(step.op.name.rpartition("::")[2] + "_", step.op.fn)
    call = f"{operator}({', '.join([layer, *(_expression(emitter, arg) for arg in rest)])})"
    if step.single:
        name = step.outputs[0]
        emitter.lines.append(f"    {emitter.local(name)} = {call}" if name else f"    {call}")
    else:
        targets = "".join(f"{emitter.local(name) if name else '_'}, " for name in step.outputs)
        emitter.lines.append(f"    {targets}= {call}")


def _bind_identity(step: OpStep, bound: Mapping[str, Any]) -> tuple[Any, ...]:
    first, *rest = step.args
    if hasattr(first, "all_input_nodes"):
        first = bound[first.name]
        assert isinstance(first, LayerHandle)
    return (first, *rest)


def _expression(emitter: _Emitter, arg: Any) -> str:
    if hasattr(arg, "all_input_nodes"):
        return _reference(emitter, arg.name)
    if isinstance(arg, (list, tuple)):
        inside = ", ".join(_expression(emitter, item) for item in arg)
        return f"[{inside}]" if isinstance(arg, list) else f"({inside}{',' if len(arg) == 1 else ''})"
    if arg is None or isinstance(arg, (bool, int, float, str)):
        return repr(arg)
    return emitter.give("constant_", arg)
