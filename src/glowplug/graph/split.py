"""Cuts a captured graph into pieces and op steps: at its splitting ops, and optionally at the boundaries of layers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from glowplug.errors import CaptureError
from glowplug.graph.capture import Captured
from glowplug.graph.sources import is_weight
from glowplug.ops.layer_op import LayerOp, find_layer_op


@dataclass(frozen=True)
class Value:
    """A graph value, by name. Steps refer to names and not to nodes, so that they can outlive the graph."""

    name: str


@dataclass(frozen=True)
class Piece:
    """The part of a graph between two cuts, as a graph of its own.

    Attributes:
        gm: the piece; None if it was stored without its graph. Its inputs are in the order of `inputs`, and its output
            is a flat tuple in the order of `outputs`.
        inputs: names of the values that it reads: first those that change from call to call, then weights and handles,
            each in the order of first use, so that equal pieces have equal signatures.
        outputs: names of the values that later steps read.
        layer: the layer that it belongs to, if the graph was cut at layers.
    """

    gm: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layer: int | None = None


@dataclass(frozen=True)
class OpStep:
    """One call of a splitting op.

    Attributes:
        op: the layer op.
        overload: the traced overload, which shows how the call identifies its layer.
        args: the call's arguments; graph values are `Value`s.
        outputs: the name of each output; None for an output that no later step reads.
        single: whether the op returns one tensor instead of a tuple.
        layer: as for `Piece`.
    """

    op: LayerOp
    overload: Any
    args: tuple[Any, ...]
    outputs: tuple[str | None, ...]
    single: bool
    layer: int | None = None


Step = Piece | OpStep
LayerOf = Callable[[fx.Node], int | None]
"""The layer of a stack in which a node was traced; None outside the stack."""
Cuts = Callable[[fx.Node], bool]
"""Whether to cut around a node, so that it is a piece by itself."""


@dataclass
class _Segment:
    """The nodes of a future piece, or a splitting op with the nodes that unpack its result.

    Attributes:
        op: the splitting op, if it is a layer op.
        is_cut: whether it is a splitting op.
    """

    op: LayerOp | None = None
    is_cut: bool = False
    nodes: list[fx.Node] = field(default_factory=list)
    layer: int | None = None


def split(
    captured: Captured,
    bound: Collection[str] | None = None,
    layer_of: LayerOf | None = None,
    cuts: Cuts | None = None,
) -> tuple[list[Step], tuple[str, ...]]:
    """Cut the graph.

    Args:
        captured: the graph.
        bound: graph inputs that do not change from call to call. None: parameters, buffers and handles.
        layer_of: if given, the graph is also cut where its result changes. Nodes between two layers belong to the
            first of them; nodes after the last layer are a step of their own.
        cuts: finds splitting ops that are no layer ops. Each becomes a piece.

    Returns:
        The steps in the order of execution, and the names of the graph's outputs.

    Raises:
        CaptureError: a piece would have to pass something other than a tensor to a later one.
    """
    gm = captured.gm
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    if bound is None:
        bound = {entry.node for entry in captured.inputs if entry.type == "handle" or is_weight(entry.source)}
    segments = _segments(gm, layer_of, cuts)
    home = {node: index for index, segment in enumerate(segments) for node in segment.nodes}
    wanted = _wanted_later(segments, home, output)
    steps: list[Step] = []
    for index, segment in enumerate(segments):
        if segment.op is not None:
            steps.append(replace(_op_step(segment, wanted[index]), layer=segment.layer))
        elif segment.is_cut or wanted[index] or any(may_mutate(node) for node in segment.nodes):
            steps.append(replace(_piece(gm, segment.nodes, wanted[index], bound), layer=segment.layer))
    return steps, _names(output.args[0])


def _names(outputs: Any) -> tuple[str, ...]:
    if not all(isinstance(node, fx.Node) for node in outputs):
        raise CaptureError("the model returns something that is neither computed by the graph nor an input of it")
    if any(is_size(node) for node in outputs):
        raise CaptureError("the model returns a size; programs return tensors")
    return tuple(node.name for node in outputs)


def _segments(gm: fx.GraphModule, layer_of: LayerOf | None, cuts: Cuts | None) -> list[_Segment]:
    segments = [_Segment()]
    unpacked: dict[fx.Node, _Segment] = {}
    nodes = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    layers = [layer_of(node) if layer_of is not None else None for node in nodes]
    last = max((place for place, layer in enumerate(layers) if layer is not None), default=len(nodes))
    for place, node in enumerate(nodes):
        layer = layers[place] if layers[place] is not None or place > last else segments[-1].layer
        if layer != segments[-1].layer and not (node.target is operator.getitem and node.args[0] in unpacked):
            segments.append(_Segment(layer=layer))
        op = find_layer_op(node.target) if node.op == "call_function" else None
        if (op is not None and op.splitting) or (cuts is not None and cuts(node)):
            segment = _Segment(op, True, [node], layer)
            if layer_of is None:
                _close_gap(segments)
            segments += [segment, _Segment(layer=layer)]
            if not isinstance(node.meta.get("example_value"), torch.Tensor):  # indexing a tensor is no unpacking
                unpacked[node] = segment
        elif node.target is operator.getitem and node.args[0] in unpacked:
            unpacked[node.args[0]].nodes.append(node)
        else:
            segments[-1].nodes.append(node)
    return segments


def _close_gap(segments: list[_Segment]) -> None:
    """If no node between two splitting ops depends on the first op, move those nodes before it. Two consecutive ops,
    such as a cache update and its attention, then have no piece between them."""
    if len(segments) < 3:
        return
    *_, before, op, gap = segments
    if (
        not before.is_cut
        and not may_mutate(op.nodes[0])
        and not any(
            may_mutate(node) or any(parent in op.nodes for parent in node.all_input_nodes) for node in gap.nodes
        )
    ):
        before.nodes += gap.nodes
        gap.nodes = []


def may_mutate(node: fx.Node) -> bool:
    """Whether the node may write to one of its inputs, or to anything else."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    is_operator = getattr(node.target, "__module__", "") == "_operator"  # of which `and_` writes to nothing
    if name.endswith("_") and not name.endswith("__") and not is_operator:
        return True
    packet = getattr(node.target, "_schemas", None)
    if packet and any(schema.is_mutable for schema in packet.values()):  # an op packet: the overload is not known yet
        return True
    return bool("out" in node.kwargs or node.kwargs.get("inplace") or node.is_impure() or name in _IN_PLACE)


_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_OTHER = ("and", "or", "xor", "lshift", "rshift", "concat")
_IN_PLACE = {"setitem", "delitem", *(f"i{name}" for name in _ARITHMETIC + _OTHER)}
"""Names of the functions in `operator` that write to their first argument."""


def _wanted_later(segments: Sequence[_Segment], home: dict[fx.Node, int], output: fx.Node) -> list[list[fx.Node]]:
    """For each segment, the values that other segments or the graph's output read. Sizes never cross segments: each
    segment recomputes those that it reads."""
    wanted = [
        [
            node
            for node in segment.nodes
            if not is_size(node) and any(user is output or home.get(user) != index for user in node.users)
        ]
        for index, segment in enumerate(segments)
    ]
    # A segment that recomputes a size also needs the tensors that the size comes from.
    for index, segment in enumerate(segments):
        for node in segment.nodes:
            for parent in node.all_input_nodes:
                for needed in _tensor_roots(parent):
                    source = home.get(needed)
                    if source is not None and source != index and needed not in wanted[source]:
                        wanted[source].append(needed)
    return wanted


def _tensor_roots(node: fx.Node) -> list[fx.Node]:
    if not is_size(node) or node.op == "placeholder":
        return []
    roots: list[fx.Node] = []
    for parent in node.all_input_nodes:
        roots += _tensor_roots(parent) if is_size(parent) else [parent]
    return roots


def is_size(node: fx.Node) -> bool:
    """Whether the node's value is a symbolic size, or arithmetic on sizes."""
    value = node.meta.get("example_value")
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, torch.Size))


def _expression(node: fx.Node) -> str:
    """A key for a node: the symbolic expression of a size, the name of any other node."""
    value = node.meta.get("example_value")
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return str(value.node.expr)
    return f"%{node.name}"


def _op_step(segment: _Segment, wanted: Sequence[fx.Node]) -> OpStep:
    call, *unpack = segment.nodes
    assert segment.op is not None
    if call.kwargs:
        raise CaptureError(f"{segment.op.name} was called with keyword arguments in a trace; pass them by position")
    value: Any = call.meta.get("example_value")
    single = value is None or isinstance(value, torch.Tensor)
    if single:
        return OpStep(segment.op, call.target, _by_name(call.args), (call.name if call in wanted else None,), True)
    if call in wanted:
        raise CaptureError(f"the outputs of {segment.op.name} are used as a tuple; unpack them where the op is called")
    outputs: list[str | None] = [None] * len(value)
    for node in unpack:
        if node in wanted:
            index: Any = node.args[1]
            if outputs[index] is not None:  # unpacked twice: keep one name
                node.replace_all_uses_with(next(n for n in unpack if n.name == outputs[index]))
                continue
            outputs[index] = node.name
    return OpStep(segment.op, call.target, _by_name(call.args), tuple(outputs), False)


def _by_name(arg: Any) -> Any:
    """Replace the nodes in an argument by their names."""
    if isinstance(arg, (tuple, list)):
        return (tuple if isinstance(arg, tuple) else list)(map(_by_name, arg))
    return Value(arg.name) if isinstance(arg, fx.Node) else arg


def _example(node: fx.Node) -> dict[str, Any]:
    """The metadata for a copy of a node."""
    if "example_value" not in node.meta:
        raise CaptureError(f"the graph computes something besides tensors and sizes: {node.name}")
    return {"example_value": node.meta["example_value"]}


def _piece(gm: fx.GraphModule, nodes: Sequence[fx.Node], wanted: Sequence[fx.Node], bound: Collection[str]) -> Piece:
    """Copy `nodes` into a graph of their own."""
    body, reads = _closure(nodes)
    derived = _derivable(reads)
    varying = [node for node in reads if node.name not in bound and node not in derived]
    fixed = [node for node in reads if node.name in bound]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    sizes: dict[str, fx.Node] = {}
    for position, node in enumerate([*varying, *fixed]):
        copies[node] = graph.placeholder(f"a{position}")
        copies[node].meta = _example(node)
        sizes.setdefault(_expression(node), copies[node])
    for node, (tensor, dim) in derived.items():
        copies[node] = graph.call_function(torch.ops.aten.sym_size.int, (copies[tensor], dim))
        copies[node].meta = _example(node)
        sizes.setdefault(_expression(node), copies[node])

    def copy_of(node: fx.Node) -> fx.Node:
        return copies[node] if node in copies else sizes[_expression(node)]

    for node in body:
        known = sizes.get(_expression(node)) if is_size(node) else None
        copies[node] = known or graph.node_copy(node, copy_of)
        sizes.setdefault(_expression(node), copies[node])
    graph.output(tuple(copies[node] for node in wanted))
    return Piece(
        fx.GraphModule(gm, graph, class_name="Piece"),
        tuple(node.name for node in [*varying, *fixed]),
        tuple(node.name for node in wanted),
    )


def _derivable(reads: Sequence[fx.Node]) -> dict[fx.Node, tuple[fx.Node, int]]:
    """The sizes that a piece reads and that are also a dim of a tensor it reads. The piece takes them from the tensor,
    so that they are right for any tensor passed to it (each layer's cache may have its own length)."""
    dims: dict[str, tuple[fx.Node, int]] = {}
    for node in reads:
        value = node.meta.get("example_value")
        for dim, size in enumerate(value.shape) if isinstance(value, torch.Tensor) else ():
            if isinstance(size, torch.SymInt):
                dims.setdefault(str(size.node.expr), (node, dim))
    return {node: dims[_expression(node)] for node in reads if is_size(node) and _expression(node) in dims}


def _closure(nodes: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes of a piece, with each size moved to its first reader and sizes of other segments recomputed; and the
    values read from outside, in the order of first use. Keeps nodes that look dead, because they may write in place."""
    needed = {node for node in nodes if not is_size(node)}
    body: list[fx.Node] = []
    placed: set[fx.Node] = set()
    reads: dict[fx.Node, None] = {}
    first_of: dict[str, fx.Node] = {}

    def visit(node: fx.Node) -> None:
        """Place a node, and before it each size that it is the first to read. Where the trace computed a size does not
        matter, so equal pieces must not differ in it."""
        for parent in node.all_input_nodes:
            if parent in placed or parent in reads:
                continue
            if is_size(parent) and parent.op != "placeholder":
                visit(parent)
            elif parent not in needed:
                reads[first_of.setdefault(_expression(parent), parent) if is_size(parent) else parent] = None
        placed.add(node)
        body.append(node)

    for node in nodes:
        if node in needed:
            visit(node)
    return body, list(reads)
