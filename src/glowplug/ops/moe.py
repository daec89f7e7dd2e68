"""`glowplug::moe_forward` and `glowplug::moe_forward_shared`: routed experts as one opaque node, without a name."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from glowplug.ops.inside import Inside, inside_of
from glowplug.ops.layer_op import layer_op

SHARED_NAMES = ("shared_experts", "shared_expert", "shared_mlp")
"""What the shared experts of a mixture-of-experts block are called in public models."""


@layer_op("glowplug::moe_forward", fake=lambda hidden_states, *_: torch.empty_like(hidden_states))
def moe_forward(
    layer: nn.Module, hidden_states: Tensor, top_k_index: Tensor | None, top_k_weights: Tensor | None
) -> Tensor:
    """Routed experts of one layer.

    Args:
        layer: the experts module, called as `layer(hidden_states, top_k_index, top_k_weights)`; or, when it takes
            tokens that are routed already, as `layer(hidden_states)`.
        hidden_states: `[tokens, hidden]`.
        top_k_index: chosen experts, `[tokens, top_k]`, integer; None when the tokens are routed already.
        top_k_weights: their weights, `[tokens, top_k]`; None likewise.

    Returns:
        `[tokens, hidden]`, of the dtype of `hidden_states`.
    """
    routing = () if top_k_index is None else (top_k_index, top_k_weights)
    inside: Inside | None = inside_of(layer)
    if inside is not None and inside.serves(layer, hidden_states):
        output = inside.run(hidden_states, *routing)
    else:
        output = layer(hidden_states, *routing)
    return output if output.is_contiguous() else output.contiguous()


@layer_op("glowplug::moe_forward_shared", fake=lambda hidden_states: torch.empty_like(hidden_states))
def moe_forward_shared(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    """A whole mixture-of-experts block: router, routed experts, and shared experts beside them.

    On CUDA the shared experts run on a side stream while the routed ones run on the current stream; elsewhere one
    after the other. The sum is the block's own: the block's forward runs, and only finds its shared output ready.

    Args:
        layer: the block; its shared experts are a submodule called as one of `SHARED_NAMES`.
        hidden_states: `[batch, tokens, hidden]` (or whatever the block takes).

    Returns:
        The block's output, of the shape and dtype of `hidden_states`.
    """
    inside: Inside | None = inside_of(layer)
    if inside is not None and inside.serves(layer, hidden_states):
        output = inside.run(hidden_states)
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
    """Stands in for the shared experts during one call: hands out the output that the side stream is computing."""

    def __init__(self, source: nn.Module, hidden_states: Tensor, output: Tensor, done: Any) -> None:
        super().__init__()
        self.__dict__["source"] = source
        self.hidden_states, self.output, self.done = hidden_states, output, done

    def forward(self, hidden_states: Tensor) -> Tensor:
        given = self.hidden_states
        same = hidden_states.data_ptr() == given.data_ptr() and hidden_states.numel() == given.numel()
        if not (same and hidden_states.is_contiguous() and given.is_contiguous()):
            return self.__dict__["source"](hidden_states)  # the block feeds them something else: compute that
        stream = torch.cuda.current_stream(given.device)
        stream.wait_event(self.done)
        self.output.record_stream(stream)
        return self.output.view(*hidden_states.shape[:-1], self.output.shape[-1])


@functools.cache
def _side_stream(device: torch.device) -> Any:
    """One for each device, for good."""
    return torch.cuda.Stream(device)


def _with_shared_on_side_stream(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    name = shared_experts_name(layer)
    if name is None or "forward" in layer.__dict__:  # one that is bound to this very block
        return layer(hidden_states)
    shared = layer._modules[name]
    assert shared is not None
    device = hidden_states.device
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        output = shared(hidden_states)
        done = side.record_event()
    hidden_states.record_stream(side)
    # A shallow copy of the block with its own table of children: the block itself, which other threads may be
    # running, stays as it is, and no weight is copied.
    shadow = copy.copy(layer)
    shadow.__dict__["_modules"] = {**layer._modules, name: _Ready(shared, hidden_states, output, done)}
    return shadow(hidden_states)
