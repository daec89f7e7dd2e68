"""What quantization does to layers, weights made of several tensors and methods that print them, keeps none apart."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_nets import Net, check, llama, net_with
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import glowplug


class Quantized(torch.Tensor):
    """A weight of eight bits with a scale for each row, as quantization libraries have them."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor, factor: int) -> Quantized:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, data: Tensor, scale: Tensor, factor: int) -> None:
        self.data_of, self.scale_of, self.factor = data, scale, factor

    def __repr__(self, *_: Any, **__: Any) -> str:
        return "Quantized"

    def __tensor_flatten__(self) -> tuple[list[str], int]:
        return ["data_of", "scale_of"], self.factor

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], factor: int, _size: Any, _stride: Any) -> Quantized:
        return cls(inner["data_of"], inner["scale_of"], factor)

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].data_of, args[0].scale_of, args[0].factor)
        plain = pytree.tree_map_only(cls, lambda t: t.data_of.to(t.scale_of.dtype) * t.scale_of * t.factor, args)
        return func(*plain, **(kwargs or {}))


def printed(linear: nn.Linear, own: Callable[[], str]) -> str:
    """How a quantized Linear prints itself."""
    return f"{own()}, weight={type(linear.weight).__name__}"


def quantize(model: nn.Module, factor: Callable[[int], int] = lambda _: 1) -> None:
    """What libraries do to each Linear: another weight, and a bound method that prints it."""
    for index, linear in enumerate(m for m in model.modules() if isinstance(m, nn.Linear)):
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        data = (linear.weight.detach() / scale).round().to(torch.int8)
        linear.weight = nn.Parameter(Quantized(data, scale, factor(index)), requires_grad=False)
        prints = functools.partial(printed, own=linear.extra_repr)
        linear.extra_repr = types.MethodType(prints, linear)  # type: ignore[method-assign]


@pytest.mark.parametrize("verify", ["off", "once"])
def test_quantized_layers(verify: str) -> None:
    net = Net().eval()
    quantize(net)
    report = check(net, verify=verify)
    assert (report.strategy, report.fallbacks, report.template_layers) == ("stamped", [], 4)


def test_a_quantized_transformers_model() -> None:
    model = llama()
    quantize(model.model.layers)
    report = check(model, torch.randint(1, 64, (2, 5)))
    assert (report.strategy, report.fallbacks) == ("stamped", [])
    model.model.layers[3].mlp.up_proj.extra_repr = lambda: "changed"  # which only prints
    with torch.no_grad():
        model(torch.randint(1, 64, (2, 5)))
    assert report.fallbacks == []


@pytest.mark.inductor
def test_quantized_layers_whose_weights_say_different_things() -> None:
    net = Net().eval()
    quantize(net, lambda index: 1 if index < 16 else 2)
    for linear in net.modules():
        linear.__dict__.pop("extra_repr", None)
    x = torch.randn(3, 8)
    with torch.no_grad():
        expected = net(x)
        compiled = glowplug.compile(net, verify="off")
        compiled(x)
        glowplug.settle(compiled)
        actual = compiled(x)
    assert glowplug.report(net).fallbacks == []
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_what_only_prints() -> None:
    def give(layer: Any, index: int) -> None:
        layer.extra_repr = types.MethodType(lambda self: f"layer {index}", layer)
        layer._get_name = lambda: f"Block{index}"
        layer.up.extra_repr = functools.partial(str, index)

    assert check(net_with(give)).strategy == "stamped"
