"""Makes the body of a group: traces one of its layers, and compiles that."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import fx, nn

from glowplug.bodies.group import Group
from glowplug.errors import CaptureError
from glowplug.graph.capture import Captured, capture
from glowplug.graph.shapes import read_assumptions
from glowplug.graph.sources import named
from glowplug.graph.split import Piece, split
from glowplug.store.address import globals_of

T = TypeVar("T")
_CPU = torch.device("cpu")
_TENSOR = re.compile(r"L\['tensors'\]\[(\d+)\](?:\.size\(\)\[(\d+)\])?")
"""Source of one of the op's tensors, or of a size of one."""
SIZES = (
    {"batch": 1, "tokens": 1, "kv_tokens": 1},
    {"batch": 1, "tokens": 1, "kv_tokens": 6},
    {"batch": 2, "tokens": 1, "kv_tokens": 9},
    {"batch": 1, "tokens": 5, "kv_tokens": 5},
    {"batch": 3, "tokens": 2, "kv_tokens": 7},
    {"batch": 2, "tokens": 12, "kv_tokens": 12},
)
"""Calls that a body must be right for, whatever its trial goes on to time."""


@dataclass(frozen=True)
class Body:
    """A compiled body, bound to no layer.

    Attributes:
        arguments: for each input of the compiled piece an expression over the op's `tensors`, or `"@"` and the path of
            a weight in the layer.
        seconds: what making it took.
        reads: sources of what its trace read, of the layer (`L['layer']...`) and of globals.
        globals: the plain values that it read of Python modules, as text.
    """

    arguments: tuple[str, ...]
    seconds: float = 0.0
    reads: tuple[str, ...] = ()
    globals: Mapping[str, str] = field(default_factory=dict)


def make_body(group: Group, compile: Callable[[fx.GraphModule, Sequence[Any]], T]) -> tuple[Body, T]:
    """The body of a group, and what compiling its piece gave.

    Raises:
        CaptureError: it can't be traced, or its trace relied on what calls need not fulfil.
    """
    start = time.perf_counter()

    def consume(captured: Captured) -> tuple[T, tuple[str, ...]]:
        piece, arguments = _only_piece(captured, group.layers[0])
        compiled = compile(piece.gm, [n.meta["example_value"] for n in piece.gm.graph.nodes if n.op == "placeholder"])
        _check_sizes(captured, group)
        return compiled, arguments

    reads: set[str] = set()
    compiled, arguments = capture(group.own, (group.traced(), *group.examples), consume, reads)
    return Body(arguments, time.perf_counter() - start, tuple(sorted(reads)), globals_of(reads)), compiled


def _only_piece(captured: Captured, layer: nn.Module) -> tuple[Piece, tuple[str, ...]]:
    """The one piece that a body consists of, and where its inputs come from, as `Body` has it."""
    given = {entry.node: found for entry in captured.inputs if (found := _TENSOR.fullmatch(entry.source))}
    sources = {entry.node: entry for entry in captured.inputs}
    steps, outputs = split(captured, sources.keys() - given.keys())
    if len(steps) != 1 or not isinstance(steps[0], Piece) or steps[0].outputs != outputs or len(outputs) != 1:
        raise CaptureError("the body is not one piece with one output")
    paths = {id(tensor): name for name, tensor in (*layer.named_parameters(), *layer.named_buffers())}
    arguments = []
    for name in steps[0].inputs:
        if name not in sources:
            raise CaptureError(f"the body reads {name}, which is no input")
        entry = sources[name]
        if name in given:
            number, dim = given[name].groups()
            arguments.append(f"tensors[{number}]" if dim is None else f"tensors[{number}].shape[{dim}]")
        elif id(entry.value) in paths:
            arguments.append(f"@{paths[id(entry.value)]}")
        else:
            raise CaptureError(f"the body reads {named(entry.source)}, which is no weight of the layer")
    return steps[0], tuple(arguments)


def _check_sizes(captured: Captured, group: Group) -> None:
    """Refuse a trace that read positions, or that relied on sizes that calls need not have."""
    unread = {number for number, argument in enumerate(group.form.arguments) if argument.content == "positions"}
    sources = {entry.source: found for entry in captured.inputs if (found := _TENSOR.fullmatch(entry.source))}
    if any(int(found[1]) in unread for found in sources.values()):
        raise CaptureError("the body computes with positions")
    assumptions = read_assumptions(captured, set(sources))
    for sizes in SIZES:
        tensors = group.form.make(group.sizes(**sizes), _CPU)
        shapes = {f"L['tensors'][{number}]": tuple(tensor.shape) for number, tensor in enumerate(tensors)}
        broken = assumptions.broken_by(shapes)
        if broken is not None:
            raise CaptureError(f"the op is called with sizes that the body's trace excludes: {broken}")
