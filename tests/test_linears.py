"""`glowplug::linears` without its kernel, and which linear layers of a piece become one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear, silu

from glowplug.compilers import InductorCompiler
from glowplug.compilers.gpu.linears import merge_linears
from glowplug.compilers.gpu.own_kernels import launches_of
from glowplug.ops import linears as room
from glowplug.ops.linears import linears

OP = torch.ops.glowplug.linears.default


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 8), (2, 3, 8), (0, 8), (8,)])
def test_equals_torch(bias: bool, shape: tuple[int, ...]) -> None:
    x, weights = torch.randn(shape), [torch.randn(n, 8) for n in (5, 4, 7)]
    biases = [torch.randn(len(weight)) if bias else None for weight in weights]
    outputs = linears(x, weights, biases)
    for output, weight, added in zip(outputs, weights, biases, strict=True):
        torch.testing.assert_close(output, linear(x, weight, added))
        assert output.is_contiguous()
    torch.library.opcheck(OP, (x, weights, biases), test_utils=("test_schema", "test_faketensor"))


def test_what_the_kernel_must_not_get() -> None:
    x, weight, bias = (torch.randn(size, dtype=torch.bfloat16) for size in ((2, 8), (5, 8), (5,)))
    assert room._fits(x, [weight, weight], [bias, bias])
    assert room._fits(x, [weight], [None])
    wrong: list[tuple[Any, ...]] = [
        (x.float(), [weight.float()], [None]),
        (x, [weight.half()], [None]),
        (x, [weight[:, ::2]], [None]),
        (x, [weight.t().contiguous().t()], [None]),
        (x[:, :6], [weight], [None]),
        (x, [weight, weight], [bias, None]),
        (x, [weight], [bias[:4]]),
        (x, [weight], [bias.float()]),
        (x, [weight] * 4, [None] * 4),
        (x, [weight.to("meta")], [None]),
    ]
    for arguments in wrong:
        assert not room._fits(*arguments)


Q, K, V = (torch.randn(n, 8, dtype=torch.bfloat16) for n in (16, 4, 4))
B = [torch.randn(n, dtype=torch.bfloat16) for n in (16, 4, 4)]
X = torch.randn(3, 8, dtype=torch.bfloat16)


def traced(function: Callable[..., Any], *tensors: Tensor, device: str = "cuda") -> fx.GraphModule:
    """The graph of a function, as a capture on a device would give it."""
    gm = fx.symbolic_trace(function)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in tensors]

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            n.meta["example_value"] = value = super().run_node(n)
            return value

    with mode:
        Run(gm).run(*fakes)
    return gm


def counts(gm: fx.GraphModule) -> list[int]:
    """The linear layers of each call of the op."""
    return [len(node.args[1]) for node in gm.graph.nodes if node.target is OP]


def check(function: Callable[..., Any], expected: list[int], *tensors: Tensor, device: str = "cuda") -> None:
    gm = traced(function, *tensors, device=device)
    before = str(gm.graph)
    merged = merge_linears(gm)
    assert counts(merged) == expected
    assert str(gm.graph) == before
    assert (merged is gm) == (not expected)
    merged.graph.lint()
    outputs, wanted = (run(*(t.clone() for t in tensors)) for run in (merged, function))
    for output, right in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(output, right)


def test_layers_of_one_input_are_one_call() -> None:
    def qkv(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return linear(x, q), silu(linear(x, weight=k)), linear(input=x, weight=v)

    check(qkv, [3], X, Q, K, V)


def test_at_most_three_and_only_alike() -> None:
    def many(x: Tensor, q: Tensor, k: Tensor, v: Tensor, b: Tensor, o: Tensor) -> Any:
        outputs = [linear(x, weight) for weight in (q, k, v, k)]
        return *outputs, linear(x, k, b), linear(outputs[0], o)

    check(many, [3, 1, 1, 1], X, Q, K, V, B[1], torch.randn(5, 16, dtype=torch.bfloat16))


def test_none_moves_across_what_writes_to_its_input() -> None:
    def writes(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Any:
        first = linear(x, q), linear(x, k)
        x.add_(1)
        return *first, linear(x, v), linear(x, k)

    def in_place(x: Tensor, q: Tensor, k: Tensor) -> Any:
        first = linear(x, q)
        return first, silu(x, inplace=True), linear(x, k)

    def by_function(x: Tensor, q: Tensor, k: Tensor) -> Any:
        first = linear(x, q)
        return first, torch.relu_(x), linear(x, k)

    check(writes, [2, 2], X, Q, K, V)
    check(in_place, [1, 1], X, Q, K)
    check(by_function, [1, 1], X, Q, K)


def test_what_is_no_plain_layer_stays() -> None:
    def two(x: Tensor, q: Tensor, k: Tensor) -> Any:
        return linear(x, q), linear(x, k)

    def computed(x: Tensor, q: Tensor, k: Tensor, b: Tensor) -> Any:
        return linear(x, q * 2), linear(x, k, b + 1)

    check(two, [], X.float(), Q.float(), K.float())
    check(two, [], X, Q, K, device="cpu")
    check(computed, [], X, Q, K, B[1])


def test_a_tensor_of_another_class_stays() -> None:
    gm = traced(lambda x, q: (linear(x, q),), X, Q)
    weight = next(node for node in gm.graph.nodes if node.name == "q")
    weight.meta["example_value"] = nn.Parameter(Q)  # such as a quantized or distributed weight
    assert merge_linears(gm) is gm


def test_without_a_gpu_there_is_nothing_to_compile() -> None:
    gm = merge_linears(traced(lambda x, q: (linear(x, q),), X, Q))
    if torch.version.cuda is None:
        assert launches_of([gm]) == []
    assert not InductorCompiler().merges or torch.version.cuda is not None
