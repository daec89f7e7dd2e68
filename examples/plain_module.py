"""A custom op that knows its layer, in a plain module: no transformers, one compiled piece for all layers.

Run: python examples/plain_module.py
"""

import torch
from torch import Tensor, nn

import glowplug


class Experts(nn.Module):
    """A layer whose body no compiler should see."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, hidden, hidden) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return run_experts(self, x)


@glowplug.layer_op("example::run_experts", fake=lambda x: torch.empty_like(x))
def run_experts(layer: Experts, x: Tensor) -> Tensor:
    """Any Python: here the weights depend on the number of tokens, as a choice of kernel would."""
    chosen = int(x.shape[1] > 8)
    return x @ layer.weight[chosen]


class Mix(nn.Module):
    """Stands for attention: the graph is cut here."""

    def forward(self, x: Tensor) -> Tensor:
        return mix(self, x)


@glowplug.layer_op("example::mix", fake=lambda x: torch.empty_like(x), splitting=True)
def mix(layer: Mix, x: Tensor) -> Tensor:
    """A running mean over tokens."""
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mix, self.experts, self.norm = Mix(), Experts(hidden), nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts(self.norm(x + self.mix(x)))


def main() -> None:
    """Compile twelve blocks, compare with eager, show what was compiled."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(64) for _ in range(12)]).eval()
    x = torch.randn(2, 16, 64)
    with torch.no_grad():
        expected = model(x)
        output = glowplug.compile(model)(x)
    print(glowplug.report(model))
    print(f"largest difference from eager: {(output - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()
