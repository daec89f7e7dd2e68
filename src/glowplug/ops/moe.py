"""`glowplug::moe_forward` and `glowplug::moe_forward_shared`: routed experts as one opaque node without a name."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from glowplug.layers.context import body_for
from glowplug.ops.layer_op import layer_op

SHARED_NAMES = ("shared_experts", "shared_expert", "shared_mlp")
"""Names of the shared experts in the mixture-of-experts blocks of public models."""


@layer_op("glowplug::moe_forward", fake=lambda hidden_states, *_: torch.empty_like(hidden_states))
def moe_forward(
    layer: nn.Module, hidden_states: Tensor, top_k_index: Tensor | None, top_k_weights: Tensor | None
) -> Tensor:
    """Routed experts of one layer.

    Args:
        layer: the experts module, called as `layer(hidden_states, top_k_index, top_k_weights)`; or as
            `layer(hidden_states)` if it takes tokens that are already routed.
        hidden_states: `[tokens, hidden]`.
        top_k_index: chosen experts, `[tokens, top_k]`, integer; None if the tokens are already routed.
        top_k_weights: their weights, `[tokens, top_k]`; None if the tokens are already routed.

    Returns:
        `[tokens, hidden]`, of the dtype of `hidden_states`.
    """
    tensors = (hidden_states,) if top_k_index is None else (hidden_states, top_k_index, top_k_weights)
    output = (body_for(layer, tensors) or layer)(*tensors)
    return output if output.is_contiguous() else output.contiguous()


@layer_op("glowplug::moe_forward_shared", fake=lambda hidden_states: torch.empty_like(hidden_states))
def moe_forward_shared(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    """A whole mixture-of-experts block: router, routed experts, and shared experts.

    On CUDA the shared experts run on a side stream while the routed experts run on the current stream; on other devices
    they run one after the other. The block's own forward runs and adds both outputs.

    Args:
        layer: the block; the name of its shared experts is one of `SHARED_NAMES`.
        hidden_states: `[batch, tokens, hidden]` or any other shape that the block takes.

    Returns:
        The block's output, of the shape and dtype of `hidden_states`.
    """
    body = body_for(layer, (hidden_states,))
    if body is not None:
        output = body(hidden_states)
    elif hidden_states.device.type != "cuda":
        output = layer(hidden_states)
    else:
        output = _with_shared_on_side_stream(layer, hidden_states)
    return output if output.is_contiguous() else output.contiguous()


def shared_experts_name(block: nn.Module) -> str | None:
    """The name of the block's shared experts, or None if it has none."""
    children = block._modules
    return next((name for name in SHARED_NAMES if children.get(name) is not None), None)


class _Ready(nn.Module):
    """Stands in for the shared experts during one call: returns the output that the side stream computes."""

    def __init__(self, source: nn.Module, hidden_states: Tensor, output: Tensor, computed: Any) -> None:
        super().__init__()
        self.__dict__["source"] = source
        self.hidden_states, self.output, self.computed = hidden_states, output, computed

    def forward(self, hidden_states: Tensor) -> Tensor:
        expected = self.hidden_states
        same = hidden_states.data_ptr() == expected.data_ptr() and hidden_states.numel() == expected.numel()
        if not (same and hidden_states.is_contiguous() and expected.is_contiguous()):
            return self.__dict__["source"](hidden_states)  # the block passes them another input
        stream = torch.cuda.current_stream(expected.device)
        stream.wait_event(self.computed)
        self.output.record_stream(stream)
        return self.output.view(*hidden_states.shape[:-1], self.output.shape[-1])


@functools.cache
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


def _with_shared_on_side_stream(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    name = shared_experts_name(layer)
    if name is None or "forward" in layer.__dict__:  # such a forward is bound to the original block
        return layer(hidden_states)
    shared = layer._modules[name]
    assert shared is not None
    device = hidden_states.device
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        output = shared(hidden_states)
        computed = side.record_event()
    hidden_states.record_stream(side)
    # Use a shallow copy of the block with its own table of children. It shares the weights, and the block itself does
    # not change, as other threads may be running it.
    shadow = copy.copy(layer)
    shadow.__dict__["_modules"] = {**layer._modules, name: _Ready(shared, hidden_states, output, computed)}
    return shadow(hidden_states)
