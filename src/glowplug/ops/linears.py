"""`glowplug::linears`: several linear layers of one input, such as those of queries, keys and values.

On CUDA, few rows are one launch of a Triton kernel, which reads each weight once at the speed of the memory. cuBLAS
takes one or two launches for each, and does not fill the GPU with the small ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glowplug.ops.expert_linear import has_kernel

FEW_ROWS = 16
"""Rows up to which the kernel runs."""
MOST = 3
"""Linear layers of one launch."""
BLOCK_K = 512
"""Inputs that the kernel reads at a time."""
HALF = (torch.bfloat16, torch.float16)
"""The dtypes of half precision."""


def linears(input: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """Linear layers of one input.

    Args:
        input: `[..., K]`, floating.
        weights: of each layer, `[N, K]`, of the dtype of `input`; up to `MOST`.
        biases: `[N]` of each layer, or None for all of them.

    Returns:
        For each layer `[..., N]`, contiguous, of the dtype of `input`; the kernel sums in float32.
    """
    outputs: list[Tensor] = torch.ops.glowplug.linears.default(input, weights, biases)
    return outputs


def _run(input: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    rows = math.prod(input.shape[:-1])
    if 0 < rows <= FEW_ROWS and _fits(input, weights, biases) and has_kernel(input.device):
        from glowplug.ops.triton_kernels import linears_launch

        outputs = _fake(input, weights, biases)
        flat = [bias.contiguous() if bias is not None else None for bias in biases]
        with torch.cuda.device(input.device):
            linears_launch(input.contiguous(), weights, flat, outputs, rows).run()
        return outputs
    pairs = zip(weights, biases, strict=True)
    return [torch.nn.functional.linear(input, weight, bias).contiguous() for weight, bias in pairs]


def _fits(input: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> bool:
    """Whether the kernel computes layers of these sizes, if it runs on the device."""
    if len(weights) > MOST or len(biases) != len(weights) or len({bias is None for bias in biases}) != 1:
        return False
    return input.dtype in HALF and all(
        weight.dim() == 2
        and weight.is_contiguous()
        and weight.numel() < 2**31
        and (weight.shape[1], weight.dtype, weight.device) == (input.shape[-1], input.dtype, input.device)
        and (bias is None or (bias.shape, bias.dtype, bias.device) == (weight.shape[:1], weight.dtype, weight.device))
        for weight, bias in zip(weights, biases, strict=True)
    )


def _fake(input: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    return [input.new_empty((*input.shape[:-1], weight.shape[0])) for weight in weights]


_LIBRARY = torch.library.Library("glowplug", "FRAGMENT")
_LIBRARY.define("linears(Tensor input, Tensor[] weights, Tensor?[] biases) -> Tensor[]")
_LIBRARY.impl("linears", _run, "CompositeExplicitAutograd")
torch.library.register_fake("glowplug::linears", _fake, lib=_LIBRARY)
