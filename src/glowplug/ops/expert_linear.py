"""`glowplug::expert_linear`: a linear layer in which each row has the weight of its own expert.

On CUDA, few pairs of rows and experts are one launch of a Triton kernel that reads the weights of each chosen expert
once. Nothing waits for the GPU, so that a CUDA graph can record it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FEW = 512
"""Pairs up to which the kernel runs at once."""
SIZES = (16, 64, 256, FEW)
"""Numbers of pairs for which a kernel is compiled; one for up to 16 pairs, and so on. Powers of two."""
_GATHERED_BYTES = 64 << 20
"""The memory that weights gathered for single pairs may take at a time."""


@dataclass(frozen=True)
class Config:
    """What a kernel is compiled for.

    Attributes:
        pairs: the most pairs; a power of two.
        by_pair: whether a program belongs to a pair, of which the first of each expert works, or to an expert.
        block_m: rows of an expert that a program handles at a time; a power of two from 16 to `pairs`.
        block_n: columns of a program; a power of two, at least 16.
        block_k: inputs read at a time; a power of two, at least 16.
        stages: blocks in flight.
        warps: warps of a program.
    """

    pairs: int
    by_pair: bool
    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int


def config_of(pairs: int, experts: int, n: int, k: int, transposed: bool, size: int = 2) -> Config:
    """The configuration for at most `FEW` pairs. Depends on the number of pairs only by `SIZES`.

    Args:
        pairs: S.
        experts: E.
        n: outputs.
        k: inputs.
        transposed: whether the outputs, not the inputs, lie next to each other in memory.
        size: bytes of an element.
    """
    most = next(bound for bound in SIZES if pairs <= bound)
    block_m = min(most, 16 if most <= 32 * experts else 32)
    block_k = (128 if k > 64 else 64) * 2 // size
    return Config(most, most <= experts, block_m, 64, block_k, 4 if block_m < 64 else 3, 4)


def has_kernel(device: torch.device) -> bool:
    """Whether the Triton kernel runs on a device: an NVIDIA GPU of compute capability 8.0 or later."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and _has_triton()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class _Mode(threading.local):
    """How this thread computes."""

    without_kernel = False


_mode = _Mode()


@contextlib.contextmanager
def without_kernel() -> Iterator[None]:
    """In this context, round where transformers' `grouped_mm` experts do: the Triton kernel adds the bias before it
    rounds."""
    before, _mode.without_kernel = _mode.without_kernel, True
    try:
        yield
    finally:
        _mode.without_kernel = before


def expert_linear(
    input: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None, top_k: int, transposed: bool
) -> Tensor:
    """A linear layer in which each row has the weight of its own expert. Pair s reads row `s // top_k` of the input.

    Args:
        input: `[S / top_k, K]`, floating.
        weight: `[E, N, K]`, or `[E, K, N]` if `transposed`; of the dtype of `input`.
        experts: the expert of each pair, `[S]`, int32 or int64. The row of a pair whose expert is not in `[0, E)` is 0.
        bias: `[E, N]`, or None.
        top_k: pairs of each row of the input.
        transposed: see `weight`.

    Returns:
        `[S, N]`, of the dtype of `input`; summed in float32.

    Raises:
        ValueError: shapes or dtypes don't fit together.
    """
    output: Tensor = torch.ops.glowplug.expert_linear.default(input, weight, experts, bias, top_k, transposed)
    return output


def _run(input: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None, top_k: int, transposed: bool) -> Tensor:
    _check(input, weight, experts, bias, top_k, transposed)
    input, experts = input.contiguous(), experts.contiguous()
    bias = bias.contiguous() if bias is not None else None
    pairs = experts.shape[0]
    if pairs == 0 or weight.numel() == 0:
        return _fake(input, weight, experts, bias, top_k, transposed).zero_()
    triton = has_kernel(weight.device) and _spans(weight) < 2**31 and not _mode.without_kernel
    if triton and pairs <= FEW:
        return _by_kernel(input, weight, experts, bias, top_k, transposed)
    if _can_group(weight):
        return _grouped(input, weight, experts, bias, top_k, transposed)
    if triton and top_k <= FEW:
        return _by_kernel_in_turns(input, weight, experts, bias, top_k, transposed)
    return _gathered(input, weight, experts, bias, top_k, transposed)


def _fake(input: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None, top_k: int, transposed: bool) -> Tensor:
    return input.new_empty((experts.shape[0], weight.shape[2 if transposed else 1]))


def _check(input: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None, top_k: int, transposed: bool) -> None:
    if input.dim() != 2 or weight.dim() != 3 or experts.dim() != 1:
        raise ValueError("expert_linear takes an input of 2 dimensions, a weight of 3 and experts of 1")
    n, k = weight.shape[2 if transposed else 1], weight.shape[1 if transposed else 2]
    if input.shape[1] != k or input.shape[0] * top_k != experts.shape[0]:
        raise ValueError(
            f"expert_linear: an input of {tuple(input.shape)} does not fit a weight of {tuple(weight.shape)} and "
            f"{experts.shape[0]} pairs, {top_k} a row"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0], n):
        raise ValueError(f"expert_linear: a bias of {tuple(bias.shape)} does not fit a weight of {tuple(weight.shape)}")
    if input.dtype != weight.dtype or not weight.is_floating_point():
        raise ValueError(f"expert_linear: an input of {input.dtype} does not fit a weight of {weight.dtype}")
    if experts.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expert_linear takes experts of int32 or int64, not of {experts.dtype}")


def _spans(weight: Tensor) -> int:
    """The extent of one expert's weight in memory, in elements."""
    return sum((size - 1) * stride for size, stride in zip(weight.shape[1:], weight.stride()[1:], strict=True)) + 1


def _by_kernel(
    input: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None, top_k: int, transposed: bool
) -> Tensor:
    """At most `FEW` pairs, in one launch."""
    from glowplug.ops.triton_kernels import expert_linear_launch

    output = _fake(input, weight, experts, bias, top_k, transposed)
    launch = expert_linear_launch(input, weight, experts, bias, output, experts.shape[0], top_k, transposed)
    with torch.cuda.device(weight.device):
        launch.run()
    return output


def _by_kernel_in_turns(
    input: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None, top_k: int, transposed: bool
) -> Tensor:
    """As many rows at a time as make `FEW` pairs."""
    rows = FEW // top_k
    return torch.cat(
        [
            _by_kernel(some, weight, chosen, bias, top_k, transposed)
            for some, chosen in zip(input.split(rows), experts.split(rows * top_k), strict=True)
        ]
    )


def _can_group(weight: Tensor) -> bool:
    """Whether torch's grouped matrix product takes the weight: bfloat16 on an NVIDIA GPU, each row of 16 bytes or a
    multiple."""
    return (
        weight.device.type == "cuda"
        and torch.version.cuda is not None
        and weight.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(weight.device) >= (8, 0)
        and weight.is_contiguous()
        and weight.shape[1] % 8 == 0
        and weight.shape[2] % 8 == 0
        and weight.data_ptr() % 16 == 0
    )


def _grouped(
    input: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None, top_k: int, transposed: bool
) -> Tensor:
    """Many pairs: sorted by their expert."""
    count = weight.shape[0]
    chosen, order = experts.masked_fill((experts < 0) | (experts >= count), count).sort(stable=True)
    ends = torch.searchsorted(
        chosen, torch.arange(count, dtype=chosen.dtype, device=chosen.device), right=True, out_int32=True
    )
    multiply: Any = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    product = multiply(input[order // top_k], weight if transposed else weight.transpose(1, 2), offs=ends)
    if bias is not None:
        product += bias[chosen.clamp(max=count - 1)]
    product.masked_fill_((chosen == count)[:, None], 0)  # which the product leaves unwritten
    return torch.empty_like(product).index_copy_(0, order, product)


def _gathered(
    input: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None, top_k: int, transposed: bool
) -> Tensor:
    """Anywhere: gathers the weights of some pairs at a time."""
    count = weight.shape[0]
    some = max(1, _GATHERED_BYTES // (weight.shape[1] * weight.shape[2] * weight.element_size()))
    known = (experts >= 0) & (experts < count)
    chosen = experts.clamp(0, count - 1)
    rows = torch.arange(experts.shape[0], device=experts.device) // top_k
    products = []
    for some_chosen, some_rows in zip(chosen.split(some), rows.split(some), strict=True):
        weights = weight[some_chosen]
        product = torch.bmm(input[some_rows, None], weights if transposed else weights.transpose(1, 2)).squeeze(1)
        products.append(product if bias is None else product + bias[some_chosen])
    return torch.cat(products).masked_fill(~known[:, None], 0)


_LIBRARY = torch.library.Library("glowplug", "FRAGMENT")
_LIBRARY.define(
    "expert_linear(Tensor input, Tensor weight, Tensor experts, Tensor? bias, int top_k, bool transposed) -> Tensor"
)
_LIBRARY.impl("expert_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("glowplug::expert_linear", _fake, lib=_LIBRARY)
