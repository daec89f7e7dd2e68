"""Makes the body of a group: traces one of its layers and compiles the graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import fx, nn

from glowplug.bodies.body import Body
from glowplug.bodies.group import Group
from glowplug.errors import CaptureError
from glowplug.graph.capture import Captured, capture
from glowplug.graph.shapes import as_python, read_assumptions
from glowplug.graph.sources import named, parse
from glowplug.graph.split import Piece, split
from glowplug.store.address import globals_of

T = TypeVar("T")
_TRACED = {"batch": 2, "tokens": 8, "kv_tokens": 11}
"""Sizes for the trace: at least 2 and all different, so that no two are unified."""
SIZES = (
    {"batch": 1, "tokens": 1, "kv_tokens": 1},
    {"batch": 1, "tokens": 1, "kv_tokens": 6},
    {"batch": 2, "tokens": 1, "kv_tokens": 9},
    {"batch": 1, "tokens": 5, "kv_tokens": 5},
    {"batch": 3, "tokens": 2, "kv_tokens": 7},
    {"batch": 2, "tokens": 12, "kv_tokens": 12},
)
"""Sizes of calls for which every body must be right."""


def make_body(group: Group, compile: Callable[[fx.GraphModule, Sequence[Any]], T]) -> tuple[Body, T]:
    """The body of a group, and what `compile` returned for its piece.

    Raises:
        CaptureError: the layer can't be traced, or its trace relies on something that calls need not fulfil.
    """
    start = time.perf_counter()

    def consume(captured: Captured) -> tuple[T, tuple[str, ...], tuple[str, ...]]:
        piece, arguments = _only_piece(captured, group.layers[0])
        compiled = compile(piece.gm, [n.meta["example_value"] for n in piece.gm.graph.nodes if n.op == "placeholder"])
        return compiled, arguments, _relations(captured, group)

    reads: set[str] = set()
    compiled, arguments, relations = capture(
        group.own, (group.traced(), *group.form.make(group.sizes(**_TRACED), group.device)), consume, reads
    )
    return Body(arguments, relations, time.perf_counter() - start, tuple(sorted(reads)), globals_of(reads)), compiled


def _tensor(source: str) -> tuple[int, int | None] | None:
    """The index of the op's tensor that a source refers to, and the dim if it is a size; None for other sources."""
    parsed = parse(source)
    if parsed is None or parsed.root != "tensors" or len(parsed.path) != 1:
        return None
    return parsed.path[0].name, parsed.size


def _only_piece(captured: Captured, layer: nn.Module) -> tuple[Piece, tuple[str, ...]]:
    """The single piece of a body, and `Body.arguments` for its inputs."""
    tensors = {entry.node: at for entry in captured.inputs if (at := _tensor(entry.source)) is not None}
    sources = {entry.node: entry for entry in captured.inputs}
    steps, outputs = split(captured, sources.keys() - tensors.keys())
    if len(steps) != 1 or not isinstance(steps[0], Piece) or steps[0].outputs != outputs or len(outputs) != 1:
        raise CaptureError("the body is not one piece with one output")
    paths = {id(tensor): name for name, tensor in (*layer.named_parameters(), *layer.named_buffers())}
    arguments = []
    for name in steps[0].inputs:
        if name not in sources:
            raise CaptureError(f"the body reads {name}, which is no input")
        entry = sources[name]
        if name in tensors:
            number, dim = tensors[name]
            arguments.append(f"tensors[{number}]" if dim is None else f"tensors[{number}].shape[{dim}]")
        elif id(entry.value) in paths:
            arguments.append(f"@{paths[id(entry.value)]}")
        else:
            raise CaptureError(f"the body reads {named(entry.source)}, which is no weight of the layer")
    return steps[0], tuple(arguments)


def _relations(captured: Captured, group: Group) -> tuple[str, ...]:
    """What the trace, or the compiler, relied on of sizes: `Body` checks it at each call.

    Raises:
        CaptureError: it excludes sizes that calls have, or computes with positions.
    """
    arguments = group.form.arguments
    sources = {entry.source: found for entry in captured.inputs if (found := _tensor(entry.source)) is not None}
    if any(arguments[found[0]].content == "positions" for found in sources.values()):
        raise CaptureError("the body computes with positions")
    assumptions = read_assumptions(captured, set(sources))
    numbers = {source: sources[source][0] for source in assumptions.dims}
    for sizes in SIZES:
        shapes = {source: arguments[number].shape(group.sizes(**sizes)) for source, number in numbers.items()}
        broken = assumptions.broken_by(shapes)
        if broken is not None:
            raise CaptureError(f"the op is called with sizes that the body's trace excludes: {broken}")
    names: dict[Any, str] = {}
    for source, dims in assumptions.dims.items():
        for number, dim in enumerate(dims):
            if not isinstance(dim, int):
                names.setdefault(dim, f"shape_{numbers[source]}[{number}]")
    return tuple(as_python(relation, names) for relation in assumptions.relations)
