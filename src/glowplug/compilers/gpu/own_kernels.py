"""Compiles the Triton kernels of glowplug's own ops in pieces, while other forks compile the pieces."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from glowplug.compilers.gpu.linears import value_of
from glowplug.ops.expert_linear import SIZES, has_kernel

if TYPE_CHECKING:
    from glowplug.ops.triton_kernels import Launch

_USUAL = SIZES[:-1]
"""Numbers of pairs of tokens and experts for which the kernel of experts is compiled in any case."""


def launches_of(pieces: Iterable[fx.GraphModule]) -> list[Launch]:
    """The usual launches of glowplug's own kernels in pieces, one for each compiled kernel."""
    nodes = [node for piece in pieces for node in piece.graph.nodes if node.target in _LAUNCHES]
    launches = [launch for node in nodes for launch in _LAUNCHES[node.target](*map(_values, node.args))]
    return list({launch.compiled_for: launch for launch in launches}.values())


def _values(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return [_values(each) for each in argument]
    return value_of(argument) if isinstance(argument, fx.Node) else argument


def _linears(input: Any, weights: Any, biases: Any) -> Iterable[Launch]:
    if not has_kernel(input.device):
        return ()
    from glowplug.ops.triton_kernels import linears_launch

    return (linears_launch(input, weights, biases, [input] * len(weights), 1),)


def _expert_linear(input: Any, weight: Any, experts: Any, bias: Any, top_k: int, transposed: bool) -> Iterable[Launch]:
    if not has_kernel(weight.device):
        return ()
    from glowplug.ops.triton_kernels import expert_linear_launch

    return [expert_linear_launch(input, weight, experts, bias, input, pairs, top_k, transposed) for pairs in _USUAL]


_LAUNCHES: dict[Any, Any] = {
    torch.ops.glowplug.linears.default: _linears,
    torch.ops.glowplug.expert_linear.default: _expert_linear,
}
