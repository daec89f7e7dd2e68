"""What a start does on a GPU while forks compile: it gets the GPU ready for the first calls."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from transformers import PreTrainedModel

from glowplug.frontends.hf import cases
from glowplug.frontends.hf.calls import HfCall
from glowplug.frontends.hf.discover import BY_EXPERT, ExpertsPlan, experts_layers
from glowplug.ops.expert_linear import SIZES, expert_linear

_COMMON = SIZES[:-1]
"""Numbers of pairs of tokens and experts for which the kernel is compiled in any case."""


def warm_up(model: PreTrainedModel, plan: ExpertsPlan, call: HfCall) -> None:
    """Run a model's own forward on a few tokens, so that libraries load their kernels; and compile the kernel of its
    experts. Whatever fails here fails again where it is needed, and is reported there."""
    with contextlib.suppress(Exception), torch.no_grad():
        for _ in cases.sequences(model, call, cases.GLANCE):
            pass
        if plan.implementation == BY_EXPERT:
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
