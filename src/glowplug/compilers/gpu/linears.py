"""Before a piece is compiled for an NVIDIA GPU, makes its linear layers of half precision `glowplug::linears`, up to
three of one input in a single call. The piece's own graph, with which it is compared, keeps torch's."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from glowplug.graph.split import may_mutate
from glowplug.ops.linears import HALF, MOST


def merge_linears(piece: fx.GraphModule) -> fx.GraphModule:
    """A copy of a piece whose linear layers are `glowplug::linears`; the piece itself if it has none."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(piece.graph, copied))
    merged: list[list[fx.Node]] = []
    open_groups: dict[tuple[fx.Node, bool], list[fx.Node]] = {}
    for node in graph.nodes:
        if may_mutate(node):  # no layer moves across a node that may write to its input
            open_groups.clear()
        elif _fits(node):
            input, _, bias = _arguments(node)
            group = open_groups.get((input, bias is None), [])
            if not 0 < len(group) < MOST:
                group = open_groups[input, bias is None] = []
                merged.append(group)
            group.append(node)
    for group in merged:
        _merge(graph, group)
    return fx.GraphModule(piece, graph) if merged else piece


def _arguments(node: fx.Node) -> tuple[Any, Any, Any]:
    """The input, weight and bias of a linear layer."""
    named = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    return named["input"], named["weight"], named.get("bias")


def _fits(node: fx.Node) -> bool:
    """Whether a node is a linear layer of plain tensors on a GPU."""
    if node.op != "call_function" or node.target is not torch.nn.functional.linear:
        return False
    input, weight, bias = _arguments(node)
    values = [value_of(argument) for argument in (input, weight, *([bias] if bias is not None else []))]
    return (
        all(type(value) is FakeTensor and value.device.type == "cuda" for value in values)
        and len({value.dtype for value in values}) == 1
        and values[0].dtype in HALF
        and values[1].dim() == 2
        and _is_given(weight)
        and (bias is None or (_is_given(bias) and values[2].dim() == 1))
    )


def value_of(argument: Any) -> Any:
    """The fake tensor that a node stands for; None for anything else."""
    return argument.meta.get("example_value") if isinstance(argument, fx.Node) else None


def _is_given(argument: fx.Node) -> bool:
    """Whether a tensor is an input of the piece, and so there before its first node."""
    return argument.op == "placeholder"


def _merge(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Put one call in the place of linear layers of the same input."""
    arguments = [_arguments(node) for node in nodes]
    with graph.inserting_before(nodes[0]):
        call = graph.call_function(
            torch.ops.glowplug.linears.default,
            (arguments[0][0], [weight for _, weight, _ in arguments], [bias for _, _, bias in arguments]),
        )
        call.meta["example_value"] = [value_of(node) for node in nodes]
        for number, node in enumerate(nodes):
            output = graph.call_function(operator.getitem, (call, number))
            output.meta = dict(node.meta)
            node.replace_all_uses_with(output)
    for node in nodes:
        graph.erase_node(node)
