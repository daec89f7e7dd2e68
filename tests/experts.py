"""What `glowplug::expert_linear` computes, in float64, and inputs for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Inputs:
    """Arguments of `expert_linear`, in its order."""

    input: Tensor
    weight: Tensor
    experts: Tensor
    bias: Tensor | None
    top_k: int
    transposed: bool


def draw(
    pairs: int,
    experts: int,
    n: int,
    k: int,
    *,
    top_k: int = 1,
    transposed: bool = False,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    ids: str = "random",
) -> Inputs:
    """Random inputs. `ids`: `"random"` (with duplicates), `"one"` (the last expert) or `"strange"` (some unknown)."""
    weight = torch.randn(experts, k, n) if transposed else torch.randn(experts, n, k)
    chosen = torch.randint(0, experts, (pairs,)) if ids != "one" else torch.full((pairs,), experts - 1)
    if ids == "strange":
        chosen[::3] = experts
        chosen[1::7] = -1
        chosen[2::11] = experts + 5
    return Inputs(
        torch.randn(pairs // top_k, k).to(device, dtype),
        weight.to(device, dtype),
        chosen.to(device),
        torch.randn(experts, n).to(device, dtype) if bias else None,
        top_k,
        transposed,
    )


def reference(inputs: Inputs) -> Tensor:
    """The answer, pair by pair, in float64 on the CPU."""
    weight = inputs.weight.cpu().double()
    weight = weight.transpose(1, 2) if inputs.transposed else weight
    x = inputs.input.cpu().double()
    bias = inputs.bias.cpu().double() if inputs.bias is not None else None
    output = torch.zeros(inputs.experts.shape[0], weight.shape[1], dtype=torch.float64)
    for expert in range(weight.shape[0]):
        pairs = (inputs.experts.cpu() == expert).nonzero()[:, 0]
        output[pairs] = x[pairs // inputs.top_k] @ weight[expert].T + (bias[expert] if bias is not None else 0)
    return output


def error(output: Tensor, inputs: Inputs) -> float:
    """The relative error of an answer, which is finite, and zero where the expert is unknown."""
    expected = reference(inputs)
    unknown = (inputs.experts < 0) | (inputs.experts >= inputs.weight.shape[0])
    assert output.dtype == inputs.input.dtype
    assert output.shape == expected.shape
    assert (output[unknown] == 0).all()
    return float((output.cpu().double() - expected).norm() / expected.norm().clamp(min=1e-12))
