"""Which attributes merely name a layer, from its source; and what else tells layers apart, or does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glowplug.bench.families import build_family
from glowplug.frontends.hf.discover import stack_of
from glowplug.layers.naming import computed_with
from glowplug.layers.stack import choose_template, describe_layers, find_stack, why_no_template
from glowplug.layers.watch import Watch


def kinds_of(layers: Sequence[nn.Module]) -> tuple[int, ...]:
    """The kind of each module, as a number."""
    numbers: dict[str, int] = {}
    return tuple(numbers.setdefault(text, len(numbers)) for text in describe_layers(layers))


class Keeps(nn.Module):
    def forward(self, x: Tensor, cache: Any, layer_idx: int) -> Tensor:
        return cache.update(x, layer_idx) + cache.layers[layer_idx].sum()


class KeepsBelow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.below = Keeps()

    def forward(self, x: Tensor, past_key_values: Any, number: int) -> Tensor:
        return self.below(x, past_key_values, layer_idx=number)


class Computes(nn.Module):
    def forward(self, x: Tensor, cache: Any, layer_idx: int) -> Tensor:
        return x * layer_idx


class Renames(nn.Module):
    def forward(self, x: Tensor, cache: Any, layer_idx: int) -> Tensor:
        index = layer_idx
        return cache.update(x, index)


class Takes(nn.Module):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return x * rest[1]


class Layer(nn.Module):
    def __init__(self, child: nn.Module, layer_idx: int = 0) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.child = child

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        return self.child(x, cache, self.layer_idx)


class Decaying(nn.Module):
    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.decay = nn.Buffer(self.made_of_its_index())

    def made_of_its_index(self) -> Tensor:
        return torch.tensor(1.0 / (1 + self.layer_idx))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.decay


class DecayingAnew(Decaying):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.computed_anew()

    def computed_anew(self) -> Tensor:
        return torch.tensor(1.0 / (1 + self.layer_idx))


@pytest.mark.parametrize(
    ("child", "computes"),
    [(Keeps(), False), (KeepsBelow(), False), (Computes(), True), (Renames(), True), (Takes(), True)],
    ids=lambda value: type(value).__name__,
)
def test_an_index_handed_to_a_module_inside(child: nn.Module, computes: bool) -> None:
    assert computed_with(Layer(child)) == ({"layer_idx"} if computes else set())
    layers = [Layer(type(child)(), index) for index in range(3)]
    assert kinds_of(layers) == ((0, 1, 2) if computes else (0, 0, 0))


def test_an_index_used_by_constructors_alone() -> None:
    assert computed_with(Decaying(1)) == set()
    assert kinds_of([Decaying(index) for index in range(3)]) == (0, 0, 0)
    assert computed_with(DecayingAnew(1)) == {"layer_idx"}


@dataclass
class Settings:
    width: int
    inner: Any = None


class Configured(nn.Module):
    def __init__(self, config: Settings) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return x * self.config.width


def test_layers_with_equal_configs_of_their_own() -> None:
    configs = [Settings(1), Settings(1), Settings(2), Settings(1, Settings(3)), Settings(1, Settings(3))]
    configs[0].inner = configs[0]
    configs[1].inner = configs[1]
    assert kinds_of([Configured(config) for config in configs[2:]]) == (0, 1, 1)
    assert kinds_of([Configured(configs[2]), Configured(configs[2])]) == (0, 0)
    model = nn.Sequential(*(Configured(Settings(1)) for _ in range(3)))
    watch = Watch(model, ["L['model']._modules['0'].config.width"])
    assert watch.change() is None
    model[2].config.width = 2  # read in the trace from the first layer's own config
    assert watch.change() == "width of the model's Settings changed"


class Mixed(nn.Module):
    """Layers some of which hold no mixer, beside a list of other modules."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))
        self.layers = nn.ModuleList(nn.Sequential(nn.Identity() if i % 2 else nn.Tanh()) for i in range(6))


def test_a_stack_some_of_whose_layers_hold_nothing() -> None:
    model = Mixed()
    inside = [layer[0] for layer in model.layers if isinstance(layer[0], nn.Tanh)]
    stack = find_stack(model, inside)
    assert stack is not None and (stack.path, stack.kinds) == ("layers", (0, 1) * 3)
    assert find_stack(model, [*inside, model.experts[0]]) is None  # one lies elsewhere
    nemotron = stack_of(build_family("nemotron_h", 8))
    assert nemotron is not None and nemotron.kinds == (0, 1, 0, 1, 0, 2, 1, 0)


def test_why_there_is_no_template() -> None:
    assert why_no_template([0] * 20 + [1]).endswith("layers 18 to 20 do so as no layers before them")
    kinds = [0] * 7 + [1, 0, 0, 0, 1]
    assert choose_template(kinds) is None
    assert "shows often enough" in why_no_template(kinds)
