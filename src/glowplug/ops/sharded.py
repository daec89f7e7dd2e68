"""`glowplug::sharded`: a module whose weights are distributed over processes, run with its collectives, at a cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glowplug.errors import NotServableError
from glowplug.ops.layer_op import layer_op

SAME = -1
"""As a width: of the first tensor's shape."""


def _shape(first: Tensor, width: int, lookup: bool) -> tuple[Any, ...]:
    if width == SAME:
        return tuple(first.shape)
    return (*first.shape, width) if lookup else (*first.shape[:-1], width)


def _fake_sharded(tensors: list[Tensor], width: int, dtype: torch.dtype | None) -> Tensor:
    return tensors[0].new_empty(_shape(tensors[0], width, dtype is not None), dtype=dtype)


@layer_op("glowplug::sharded", fake=_fake_sharded, splitting=True)
def sharded(layer: nn.Module, tensors: list[Tensor], width: int, dtype: torch.dtype | None) -> Tensor:
    """Run the forward that tensor parallelism gave a module: its part on this process, and what makes it whole.

    Args:
        layer: the module.
        tensors: its arguments.
        width: the last size of its output on this process; `SAME`: the output has the first argument's shape.
        dtype: of the output of a module that looks up its argument, which adds a dimension; None: any other module,
            whose output has the first argument's dtype.

    Returns:
        The module's output, contiguous.

    Raises:
        NotServableError: the output has another form.
    """
    output = layer.__dict__["forward"](*tensors)
    first = tensors[0]
    expected = _shape(first, width, dtype is not None), dtype or first.dtype
    if not isinstance(output, Tensor) or (tuple(output.shape), output.dtype) != expected:
        found = f"{tuple(output.shape)} {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        raise NotServableError(
            f"a distributed {type(layer).__name__} gave {found}, and not {expected[0]} {expected[1]}"
        )
    output = output.contiguous()
    return output.clone() if any(output is tensor for tensor in tensors) else output
