"""What a recording relies on: where tensors lie, what attributes hold, which kernels torch would choose."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_STALE = 3
"""How often a recording may go stale, as weights or a cache moved, before nothing of its form is recorded."""
_dtype = operator.attrgetter("dtype")


@dataclass(frozen=True)
class Reads:
    """What a run may read of its model, besides what its program is bound to.

    Attributes:
        tensors: all weights and buffers.
        attributes: the attributes of each layer whose own code runs in a step: the layers' own dicts.
    """

    tensors: tuple[Tensor, ...]
    attributes: tuple[dict[str, Any], ...]


def addresses(tensors: Sequence[Tensor], read: Reads) -> tuple[Any, ...]:
    """Where tensors and those of the model lie, and how their bytes are to be read."""
    every = (*tensors, *read.tensors)
    return (*map(Tensor.data_ptr, every), *map(_dtype, every))


def equal(now: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> bool:
    """Whether dicts hold what they did. Most values are the same objects, which Python compares first."""
    try:
        return all(map(operator.eq, now, before))
    except Exception:  # such as another tensor
        return False


def key_of(value: Any) -> Hashable:
    """What an input of a recorded run may not differ in."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return value


def own_of(value: Any) -> Any:
    """Memory for an input of a recorded run."""
    return torch.empty_like(value).copy_(value) if isinstance(value, Tensor) else value


def copies_of(outputs: Sequence[Any]) -> list[Any]:
    """The outputs of a replay in memory of their own, as the next replay overwrites the recording's."""
    return [value.clone() if isinstance(value, Tensor) else value for value in outputs]


def switches() -> Hashable:
    """Torch's own switches between kernels."""
    sdp = torch.backends.cuda
    return (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        sdp.flash_sdp_enabled(),
        sdp.mem_efficient_sdp_enabled(),
        sdp.math_sdp_enabled(),
        sdp.cudnn_sdp_enabled(),
    )
