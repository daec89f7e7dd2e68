"""What a start compiles on a GPU while forks compile pieces: the kernel of experts, for the first calls."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from transformers import PreTrainedModel

from glowplug.frontends.hf.discover import BY_EXPERT, ExpertsPlan, experts_layers
from glowplug.ops.expert_linear import SIZES, expert_linear

_COMMON = SIZES[:-1]
"""Numbers of pairs of tokens and experts for which the kernel is compiled in any case."""


def compile_kernels(model: PreTrainedModel, plan: ExpertsPlan) -> None:
    """Compile the kernel of the model's experts. Whatever fails here fails again where it is needed, and is reported
    there."""
    if plan.implementation != BY_EXPERT:
        return
    with contextlib.suppress(Exception), torch.no_grad():
        layers = {tuple(p.shape for p in layer.parameters()): layer for layer in experts_layers(model).values()}
        for layer in layers.values():
            _compile_kernel(layer)


def _compile_kernel(layer: nn.Module) -> None:
    """Run the linears of experts for each usual number of pairs."""
    for name, weight in layer.named_parameters(recurse=False):
        if weight.dim() == 3:
            transposed = bool(layer.is_transposed)
            inputs = weight.shape[1 if transposed else 2]
            bias = layer._parameters.get(f"{name}_bias")
            for pairs in _COMMON:
                experts = torch.zeros(pairs, dtype=torch.long, device=weight.device)
                expert_linear(weight.new_zeros(pairs, inputs), weight, experts, bias, 1, transposed)
