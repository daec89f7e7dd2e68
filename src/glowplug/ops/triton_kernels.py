"""The Triton kernels of `glowplug::expert_linear`, for few pairs, and of `glowplug::linears`, for few rows. The only
module that imports Triton; imported on CUDA.

Checked on Triton 3.6.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from glowplug.ops.expert_linear import Config, config_of
from glowplug.ops.linears import BLOCK_K, FEW_ROWS, MOST
from glowplug.runtime.triton_key import TRITON_KEY

_BLOCK_N, _STAGES, _WARPS = 16, 3, 2
"""Of `_linears`, with `BLOCK_K`: among the fastest for every layer of three models (`benchmarks/gpu/linears.py`)."""
_SHARED = 100 << 10
"""Bytes of shared memory that this takes."""


@triton.jit
def _multiply(
    input_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    rows,
    valid,
    columns,
    expert,
    top_k,
    num_experts,
    N,
    K,
    stride_e,
    stride_n,
    stride_k,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the columns of these rows (pairs) of one expert. Unknown experts give zeros."""
    known = expert < num_experts
    depth = tl.where(known, K, 0)
    in_n = columns < N
    offsets = tl.arange(0, BLOCK_K)
    from_x = (rows // top_k)[:, None] * K + offsets[None, :]
    from_w = offsets[:, None] * stride_k + columns[None, :] * stride_n
    weight_ptr += expert.to(tl.int64) * stride_e
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN_K:
            x = tl.load(input_ptr + from_x, mask=valid[:, None], other=0.0)
            w = tl.load(weight_ptr + from_w, mask=in_n[None, :], other=0.0)
        else:
            in_k = offsets < K - start
            x = tl.load(input_ptr + from_x, mask=valid[:, None] & in_k[None, :], other=0.0)
            w = tl.load(weight_ptr + from_w, mask=in_k[:, None] & in_n[None, :], other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
        input_ptr += BLOCK_K
        weight_ptr += BLOCK_K * stride_k
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * N + columns, mask=in_n & known, other=0.0)
        total += bias.to(tl.float32)[None, :]
    output_ptrs = output_ptr + rows[:, None] * N + columns[None, :]
    tl.store(output_ptrs, total.to(output_ptr.dtype.element_ty), mask=valid[:, None] & in_n[None, :])


@triton.jit(
    do_not_specialize=["pairs", "top_k", "num_experts"],
    do_not_specialize_on_alignment=["experts_ptr", "bias_ptr"],
)
def _expert_linear(
    input_ptr,
    weight_ptr,
    experts_ptr,
    bias_ptr,
    output_ptr,
    pairs,
    top_k,
    num_experts,
    N,
    K,
    stride_e,
    stride_n,
    stride_k,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BY_PAIR: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (block of columns, slot). A slot is an expert; or, if BY_PAIR, a pair, which works if no earlier pair has
    its expert. The last slot of experts, and a pair without a known expert, write zeros."""
    slot = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    numbers = tl.arange(0, PAIRS)
    ids = tl.load(experts_ptr + numbers, mask=numbers < pairs, other=0)
    chosen = tl.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(tl.int32)
    if BY_PAIR:
        mine = tl.load(experts_ptr + slot)
        expert = tl.where((mine >= 0) & (mine < num_experts), mine, num_experts).to(tl.int32)
    else:
        expert = slot
    matches = (chosen == expert) & (numbers < pairs)
    count = tl.sum(matches.to(tl.int32), 0)
    if BY_PAIR:
        count = tl.where(tl.min(tl.where(matches, numbers, PAIRS), 0) == slot, count, 0)
    if count == 0:
        return
    if PAIRS == BLOCK_M:
        _multiply(
            input_ptr, weight_ptr, bias_ptr, output_ptr, numbers, matches, columns, expert, top_k, num_experts, N, K,
            stride_e, stride_n, stride_k, HAS_BIAS, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        rank = tl.cumsum(matches.to(tl.int32), 0) - 1
        for first in range(0, count, BLOCK_M):
            wanted = first + tl.arange(0, BLOCK_M)
            hits = (rank[None, :] == wanted[:, None]) & matches[None, :]
            rows = tl.sum(tl.where(hits, numbers[None, :], 0), 1)
            _multiply(
                input_ptr, weight_ptr, bias_ptr, output_ptr, rows, wanted < count, columns, expert, top_k, num_experts,
                N, K, stride_e, stride_n, stride_k, HAS_BIAS, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel.

    Attributes:
        kernel: the kernel.
        grid: its programs.
        arguments: its arguments; where it is only compiled, tensors may be fake.
        constants: what it is compiled for.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: tuple[tuple[str, Any], ...]

    def run(self) -> None:
        """Launch the kernel."""
        token = TRITON_KEY.give()
        try:
            self.kernel[self.grid](*self.arguments, **dict(self.constants))
        finally:
            TRITON_KEY.withdraw(token)

    def compile(self) -> tuple[str, str | None]:
        """Only compile it and its launcher, into Triton's cache. Takes tensors to lie at multiples of 16 bytes.

        Returns:
            The hash of the kernel, and the name of the launcher's folder in Triton's cache, if it is known.
        """
        compiled = self.kernel.warmup(*self._types, grid=self.grid, **dict(self.constants))
        launcher = driver.active.launcher_cls(compiled.src, compiled.metadata)
        file = getattr(getattr(launcher.launch, "__self__", None), "__file__", None)
        return compiled.hash, Path(file).parent.name if file is not None else None

    @property
    def compiled_for(self) -> tuple[Any, ...]:
        """Launches for which this is equal run the same compiled kernel."""
        return self.kernel, self._types, self.constants

    @property
    def _types(self) -> tuple[Any, ...]:
        return tuple(value.dtype if isinstance(value, Tensor) else value for value in self.arguments)


def expert_linear_launch(
    input: Tensor,
    weight: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    output: Tensor,
    pairs: int,
    top_k: int,
    transposed: bool,
    config: Config | None = None,
) -> Launch:
    """The launch that computes `expert_linear` of at most `FEW` pairs.

    Args:
        input: `[S / top_k, K]`, contiguous.
        weight: `[E, N, K]`, or `[E, K, N]` if `transposed`; each expert spans fewer than 2**31 elements.
        experts: `[S]`, contiguous.
        bias: `[E, N]`, contiguous, or None.
        output: `[S, N]`, contiguous.
        pairs: S.
        top_k: pairs of each row of the input.
        transposed: see `weight`.
        config: of the kernel; None for that of `glowplug.ops.expert_linear.config_of`.
    """
    along_n, along_k = (2, 1) if transposed else (1, 2)
    count, n, k = weight.shape[0], weight.shape[along_n], weight.shape[along_k]
    strides = weight.stride(0), weight.stride(along_n), weight.stride(along_k)
    config = config or config_of(pairs, count, n, k, transposed, weight.element_size())
    grid = (triton.cdiv(n, config.block_n), pairs if config.by_pair else count + 1)
    arguments = (input, weight, experts, bias, output, pairs, top_k, count, n, k, *strides)
    constants = {
        "HAS_BIAS": bias is not None,
        "EVEN_K": k % config.block_k == 0,
        "BY_PAIR": config.by_pair,
        "PAIRS": config.pairs,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_stages": config.stages,
        "num_warps": config.warps,
    }
    return Launch(_expert_linear, grid, arguments, tuple(constants.items()))


@triton.jit(do_not_specialize=["rows", "n_0", "n_1", "n_2"])
def _linears(
    input_ptr,
    weight_0,
    weight_1,
    weight_2,
    bias_0,
    bias_1,
    bias_2,
    output_0,
    output_1,
    output_2,
    rows,
    n_0,
    n_1,
    n_2,
    K,
    COUNT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program: a block of columns of one of the layers, one layer after the other."""
    block = tl.program_id(0)
    weight_ptr, bias_ptr, output_ptr, N = weight_0, bias_0, output_0, n_0
    if COUNT > 1:
        blocks = tl.cdiv(n_0, BLOCK_N)
        if block >= blocks:
            weight_ptr, output_ptr, N = weight_1, output_1, n_1
            if HAS_BIAS:
                bias_ptr = bias_1
            block -= blocks
            if COUNT > 2:
                blocks = tl.cdiv(n_1, BLOCK_N)
                if block >= blocks:
                    weight_ptr, output_ptr, N = weight_2, output_2, n_2
                    if HAS_BIAS:
                        bias_ptr = bias_2
                    block -= blocks
    row = tl.arange(0, BLOCK_M)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = tl.arange(0, BLOCK_K)
    in_m, in_n = row < rows, columns < N
    from_x = row[:, None] * K + offsets[None, :]
    from_w = offsets[:, None] + columns[None, :] * K
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(input_ptr + from_x, mask=in_m[:, None], other=0.0)
            w = tl.load(weight_ptr + from_w, mask=in_n[None, :], other=0.0)
        else:
            in_k = offsets < K - start
            x = tl.load(input_ptr + from_x, mask=in_m[:, None] & in_k[None, :], other=0.0)
            w = tl.load(weight_ptr + from_w, mask=in_k[:, None] & in_n[None, :], other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
        input_ptr += BLOCK_K
        weight_ptr += BLOCK_K
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=in_n, other=0.0).to(tl.float32)[None, :]
    into = output_ptr + row[:, None] * N + columns[None, :]
    tl.store(into, total.to(output_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


def linears_launch(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], outputs: Sequence[Tensor], rows: int
) -> Launch:
    """The launch that computes `linears` of at most `FEW_ROWS` rows.

    Args:
        input: `[..., K]`, contiguous.
        weights: up to `MOST`, `[N, K]`, contiguous, of fewer than 2**31 elements.
        biases: `[N]` of each, contiguous; or None for all.
        outputs: `[..., N]` of each, contiguous.
        rows: the product of the sizes before K.
    """
    k, sizes, rest = weights[0].shape[1], [weight.shape[0] for weight in weights], MOST - len(weights)
    grid = (sum(triton.cdiv(n, _BLOCK_N) for n in sizes),)
    tensors = [tensor for each in (weights, biases, outputs) for tensor in (*each, *[each[0]] * rest)]
    properties: Any = torch.cuda.get_device_properties(input.device)
    constants = {
        "COUNT": len(weights),
        "HAS_BIAS": biases[0] is not None,
        "EVEN_K": k % BLOCK_K == 0,
        "BLOCK_M": FEW_ROWS,
        "BLOCK_N": _BLOCK_N,
        "BLOCK_K": BLOCK_K,
        "num_stages": _STAGES if properties.shared_memory_per_block_optin >= _SHARED else _STAGES - 1,
        "num_warps": _WARPS,
    }
    arguments = (input, *tensors, rows, *sizes, *[0] * rest, k)
    return Launch(_linears, grid, arguments, tuple(constants.items()))
