"""Which layer is it: handles, the registry, copies of registered models, and models whose layers share names."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glowplug
from glowplug.errors import LayerLookupError, UsageError

IDENTITIES = ("hoisted", "ordered", "baked")


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return mix(self, x)


@glowplug.layer_op("test_layers::mix", fake=lambda x: torch.empty_like(x))
def mix(layer: Mix, x: Tensor) -> Tensor:
    """Its output depends on the layer's own weight."""
    return torch.tanh(x @ layer.weight)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mix() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) + x
        return x


def eager(model: nn.Module, x: Tensor) -> Tensor:
    """The class's own forward, whatever stands in its place."""
    with torch.no_grad():
        return type(model).forward(model, x)


def compiled(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    """What a freshly compiled model answers."""
    glowplug.compile(model, compiler="eager", **options)
    with torch.no_grad():
        return model(x)


def test_handle_equality_and_hash() -> None:
    a, b = Stack(), Stack()
    first, second = glowplug.register_layers(a), glowplug.register_layers(b)
    handle = first.handles["layers.0"]
    assert handle == glowplug.LayerHandle(first.scope, "layers.0")
    assert hash(handle) == hash(glowplug.LayerHandle(first.scope, "layers.0"))
    assert handle != first.handles["layers.1"]
    assert handle != second.handles["layers.0"]
    assert handle != "layers.0"
    assert len({*first.handles.values(), *second.handles.values()}) == len(first) + len(second)
    assert handle.resolve() is a.layers[0]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))], ids=["copy", "pickle"])
def test_a_copied_handle_reaches_nothing(duplicate: Any) -> None:
    stack = Stack()
    handle = glowplug.register_layers(stack).handles["layers.0"]
    other = duplicate(handle)
    assert other != handle
    with pytest.raises(LayerLookupError, match=r"layers\.0"):
        other.resolve()
    assert handle.resolve() is stack.layers[0]


def test_handle_does_not_keep_the_model_alive() -> None:
    stack = Stack()
    handle = glowplug.register_layers(stack).handles["layers.0"]
    del stack
    with pytest.raises(LayerLookupError, match="deleted"):
        handle.resolve()


@pytest.mark.parametrize("identity", IDENTITIES)
def test_unregistered_copy_does_not_reach_the_original(identity: str) -> None:
    original, x = Stack().eval(), torch.randn(2, 4)
    registry = glowplug.register_layers(original, identity=identity)
    registry.set_order("test_layers::mix", [f"layers.{i}" for i in range(4)])
    duplicate = copy.deepcopy(original)
    for parameter in duplicate.parameters():
        parameter.data.neg_()
    run = torch.compile(duplicate, backend="glowplug", options={"compiler": "eager"})
    with torch.no_grad(), glowplug.forward_context(glowplug.ForwardContext(registry, check_order=False)):
        try:
            output = run(x)
        except Exception as error:
            assert "register" in str(error)
        else:
            assert torch.equal(output, eager(duplicate, x))


@pytest.mark.parametrize("identity", IDENTITIES)
def test_compiled_copy_uses_its_own_weights(identity: str) -> None:
    original, x = Stack().eval(), torch.randn(2, 4)
    before = compiled(original, x, identity=identity)
    duplicate = copy.deepcopy(original)
    for parameter in duplicate.parameters():
        parameter.data.neg_()
    with torch.no_grad():
        output = duplicate(x)  # the copy's forward is its own engine
    assert torch.equal(output, eager(duplicate, x))
    assert not torch.equal(output, before)
    with torch.no_grad():
        assert torch.equal(original(x), before)


@pytest.mark.parametrize("identity", IDENTITIES)
def test_two_models_with_the_same_names_do_not_mix(identity: str) -> None:
    a, b, x = Stack().eval(), Stack().eval(), torch.randn(2, 4)
    expected = eager(a, x), eager(b, x)
    assert not torch.equal(*expected)
    for model in (a, b):
        glowplug.compile(model, compiler="eager", identity=identity)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(a(x), expected[0])
            assert torch.equal(b(x), expected[1])


def test_registry_lookups() -> None:
    stack = Stack()
    registry = glowplug.register_layers(stack)
    assert list(registry) == ["layers", *(f"layers.{i}" for i in range(4))]
    assert registry["layers.2"] is stack.layers[2]
    assert registry.kind("layers.0") == registry.kind("layers.1") != registry.kind("layers")
    with pytest.raises(LayerLookupError, match="'nowhere'"):
        registry["nowhere"]
    only = glowplug.register_layers(stack, layers={"mine": stack.layers[1]})
    assert list(only) == ["mine"]
    with pytest.raises(UsageError, match="identity"):
        glowplug.register_layers(stack, identity="by luck")  # type: ignore[arg-type]
