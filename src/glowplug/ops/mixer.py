"""`glowplug::mixer`: a token mixer with its own states in the cache (linear attention, state space, short convolution),
run as a whole at a cut."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from glowplug.errors import NotServableError
from glowplug.layers.context import current_context
from glowplug.ops.arguments import NOTHING, decode
from glowplug.ops.layer_op import layer_op


def _fake_mixer(hidden_states: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


@functools.lru_cache(maxsize=256)
def _takes_mask(cls: type[nn.Module]) -> bool:
    """Whether the forward of a class has a mask parameter; it may be required, even if there is no mask."""
    return "attention_mask" in inspect.signature(cls.forward).parameters


@layer_op("glowplug::mixer", fake=_fake_mixer, splitting=True)
def mixer(layer: nn.Module, hidden_states: Tensor, mask: Tensor | None, tensors: list[Tensor], options: str) -> Tensor:
    """Run a layer's own forward, with the `ForwardContext`'s cache.

    Args:
        layer: the mixer; its forward takes `hidden_states`, `attention_mask` and the arguments in `options`.
        hidden_states: `[batch, tokens, hidden]`.
        mask: the mask that the model passes to this layer, such as `[batch, tokens]`, or None.
        tensors: further tensor arguments.
        options: its other keyword arguments; see `encode`.

    Returns:
        `[batch, tokens, hidden]`, contiguous, of the hidden states' dtype: the forward's first output.

    Raises:
        NotServableError: the output has another shape or dtype.
    """
    return _run(layer, hidden_states, mask, tensors, options)[0]


def _fake_mixer_handing_on(hidden_states: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _fake_mixer(hidden_states), hidden_states.new_empty(())


@layer_op("glowplug::mixer_handing_on", fake=_fake_mixer_handing_on, splitting=True)
def mixer_handing_on(
    layer: nn.Module, hidden_states: Tensor, mask: Tensor | None, tensors: list[Tensor], options: str, place: int
) -> tuple[Tensor, Tensor]:
    """As `mixer`, for a layer that also returns a tensor for the next layer. Nothing else may compute with that tensor,
    as its shape and dtype are unknown in a trace. There it has no dims, so that reading its shape fails.

    Args:
        layer, hidden_states, mask, tensors, options: as for `mixer`.
        place: the tensor's index among the layer's outputs.

    Returns:
        The output of `mixer`, and the tensor, or `NOTHING` if there is none, which the next layer refuses.
    """
    outputs = _run(layer, hidden_states, mask, tensors, options)
    passed_on = outputs[place] if place < len(outputs) else None
    return outputs[0], passed_on if isinstance(passed_on, Tensor) else NOTHING


def _run(
    layer: nn.Module, hidden_states: Tensor, mask: Tensor | None, tensors: list[Tensor], options: str
) -> tuple[Any, ...]:
    """The layer's outputs; the first one is checked and contiguous."""
    context = current_context()
    kwargs = decode(options, tensors, context.cache if context is not None else None)
    if mask is not None or ("attention_mask" not in kwargs and _takes_mask(type(layer))):  # type: ignore[arg-type]
        kwargs["attention_mask"] = mask
    output = layer.forward(hidden_states=hidden_states, **kwargs)
    outputs = output if isinstance(output, tuple) else (output,)
    output = outputs[0]
    if output.shape != hidden_states.shape or output.dtype != hidden_states.dtype:
        raise NotServableError(
            f"{type(layer).__name__} gave {tuple(output.shape)} {output.dtype} for hidden states of "
            f"{tuple(hidden_states.shape)} {hidden_states.dtype}, which a compiled program can't go on with"
        )
    output = output.contiguous()
    return (output.clone() if output is hidden_states else output, *outputs[1:])
