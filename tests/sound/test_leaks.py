"""A compiled model that nobody holds any more goes, and its weights and programs with it."""

from __future__ import annotations

import gc
import linecache
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import families
import glowplug
from storing import StoringGraphs

IDS = torch.arange(3, 9)[None]


@glowplug.layer_op("leaks::scaled", fake=lambda x: torch.empty_like(x), splitting=True)
def scaled(layer: nn.Module, x: Tensor) -> Tensor:
    """A cut, at which a layer is looked up."""
    return x * layer.weight


class Scaled(nn.Module):
    """A layer with an op."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        """The op, and something around it."""
        return scaled(self, x.relu()) + 1


def transformer(family: str = "gpt_oss", layers: int = 8, **options: Any) -> Callable[[], nn.Module]:
    """A transformers model that has generated."""

    def make() -> nn.Module:
        model = families.build(family, layers=layers)
        glowplug.compile(model, **{"compiler": "eager", "cache_dir": "off", **options})
        model.generate(IDS, max_new_tokens=3, do_sample=False)
        assert glowplug.report(model).programs == 1
        return model

    return make


def settled(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same, once all is compiled."""

    def made() -> nn.Module:
        model = make()
        glowplug.settle(model)
        model.generate(IDS, max_new_tokens=3, do_sample=False)
        return model

    return made


def in_background() -> nn.Module:
    """A model whose program another process made."""
    model = families.build("gpt_oss", layers=8)
    glowplug.compile(model, compiler=StoringGraphs(), cache_dir="off", background=True)
    with torch.no_grad():
        model(IDS), model(IDS)
        glowplug.settle(model)
        model(IDS)
    return model


def changed() -> nn.Module:
    """A model that was changed after it was compiled."""
    model = transformer("qwen3")()
    model.model.layers[1].mlp.act_fn = nn.Tanh()
    with torch.no_grad():
        model(IDS)
    return model


def plain(layer: Callable[[], nn.Module] = lambda: nn.Linear(8, 8), **options: Any) -> Callable[[], nn.Module]:
    """A plain module."""

    def make() -> nn.Module:
        model = nn.Sequential(*(layer() for _ in range(6))).eval().requires_grad_(False)
        glowplug.compile(model, **{"compiler": "eager", "cache_dir": "off", **options})
        model(torch.randn(3, 8)), model(torch.randn(2, 3, 8))
        return model

    return make


def backend(layer: Callable[[], nn.Module] = lambda: nn.Linear(8, 8)) -> Callable[[], nn.Module]:
    """A module compiled by torch through glowplug's backend."""

    def make() -> nn.Module:
        model = nn.Sequential(*(layer() for _ in range(3))).eval().requires_grad_(False)
        registry = glowplug.register_layers(model)
        torch.compile(model, backend="glowplug", options={"compiler": "eager"})(torch.randn(3, 8))
        assert len(registry) == 3
        return model

    return make


CASES: dict[str, Callable[[], nn.Module]] = {
    "stamped": transformer(),
    "opaque experts": transformer("glm4_moe", experts="opaque"),
    "full trace": transformer("qwen3", layers=3, stamp="off"),
    "ordered": transformer("glm4_moe", layers=3, identity="ordered", experts="opaque"),
    "baked": transformer("glm4_moe", layers=3, identity="baked", experts="opaque"),
    "ends pending": transformer(layers=20, compiler=StoringGraphs()),
    "ends settled": settled(transformer(layers=20, compiler=StoringGraphs())),
    "background": in_background,
    "changed": changed,
    "plain": plain(),
    "plain with ops": plain(Scaled),
    "plain, traced": plain(stamp="off"),
    "plain with ops, traced": plain(Scaled, stamp="off"),
    "backend": backend(),
    "backend with ops": backend(Scaled),
    "plain, inductor": plain(compiler="inductor"),
    "inductor": transformer("qwen3", layers=5, compiler="inductor"),
    "op bodies, inductor": settled(transformer(layers=8, compiler="inductor")),
}


@pytest.fixture(scope="module")
def new_objects_only() -> Iterator[None]:
    """Let collections look only at what is made from here on: one of all that the suite holds takes a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("new_objects_only")
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.inductor] if "inductor" in case else []) for case in CASES]
)
@pytest.mark.parametrize("reset", [False, True])
def test_a_model_goes_with_its_last_holder(case: str, reset: bool) -> None:
    if reset and "inductor" in case:
        pytest.skip("as without")
    torch.compiler.reset()
    gc.collect()
    texts = {name for name in linecache.cache if name.startswith("<glowplug program")}
    model = CASES[case]()
    held = {name or "the model": weakref.ref(module) for name, module in model.named_modules()}
    held |= {name: weakref.ref(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    if reset:
        torch._dynamo.reset()
    del model
    gc.collect()
    gc.collect()
    assert [name for name, ref in held.items() if ref() is not None] == []
    if "traced" not in case and "backend" not in case:  # torch keeps what it compiled until it is reset
        left = {name for name in linecache.cache if name.startswith("<glowplug program")} - texts
        assert left == set()
