"""Nets of equal layers, each with something of its own, and how they are checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import glowplug

DEPTH, OTHER = 12, 10
"""Layers of a net, and the first of those that differ: deeper than a template of equal layers."""


class Block(nn.Module):
    """A residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.act: Any = torch.relu

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Net(nn.Module):
    """Layers, one after another."""

    def __init__(self, block: Callable[[], nn.Module] = Block, depth: int = DEPTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def reading(read: Callable[[Any], Any]) -> type[Block]:
    """A class of layers that multiply by something they have."""

    class Reading(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * read(self)

    return Reading


def net_with(give: Callable[[Any, int], object], block: Callable[[], nn.Module] = Block) -> Net:
    """A net, each of whose layers was given something of its own."""
    net = Net(block).eval()
    for index, layer in enumerate(net.layers):
        give(layer, index)
    return net


def attribute(name: str, value: Callable[[int], Any]) -> Callable[[Any, int], object]:
    return lambda layer, index: setattr(layer, name, value(index))


def check(model: nn.Module, *args: Any, **options: Any) -> Any:
    """Compile it and compare it with what it answered before; its report."""
    args = args or (torch.randn(3, 8),)
    with torch.no_grad():
        expected = pytree.tree_leaves(model(*args))[0]
        compiled = glowplug.compile(model, **{"compiler": "eager", **options})
        for _ in range(2):
            actual = pytree.tree_leaves(compiled(*args))[0]
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    return glowplug.report(model)


def reason_of(report: Any) -> str:
    """Why it was not stamped."""
    assert report.strategy != "stamped"
    assert report.fallbacks, "no reason"
    text = " ".join(fallback.reason for fallback in report.fallbacks)
    assert "0x" not in text and "<function" not in text
    return text


def llama(depth: int = 12) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()
