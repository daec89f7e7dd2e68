"""Fingerprints: equal for equal computations whatever their names, different for whatever changes the code."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from glowplug.errors import CaptureError
from glowplug.graph.capture import Captured, capture
from glowplug.graph.fingerprint import Fingerprint, fingerprint


def graph(build: Callable[[fx.Graph, fx.Node], Any], example: Tensor | None = None, name: str = "a0") -> fx.GraphModule:
    """A graph of one input; `build(graph, input)` gives what it returns."""
    made = fx.Graph()
    node = made.placeholder(name)
    node.meta["example_value"] = torch.empty(4, 4) if example is None else example
    made.output((build(made, node),))
    return fx.GraphModule({}, made)


def call(target: Any, *args: Any, **kwargs: Any) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    return lambda made, node: made.call_function(target, (node, *args), kwargs)


def of(build: Callable[[fx.Graph, fx.Node], Any], *args: Any) -> Fingerprint:
    return fingerprint(graph(build, *args))


def captured_print(fn: Any, *inputs: Tensor) -> Fingerprint:
    """The fingerprint of a function's whole graph, with symbolic sizes where the inputs are marked."""

    def consume(captured: Captured) -> Fingerprint:
        return fingerprint(captured.gm)

    return capture(fn, inputs, consume)


BASE = call(torch.add, 1)

DIFFERENT = {
    "constant": call(torch.add, 2),
    "type of the constant": call(torch.add, 1.0),
    "bool instead of 1": call(torch.add, True),
    "op": call(torch.mul, 1),
    "operator of the same name": call(operator.add, 1),
    "keyword": call(torch.add, 1, alpha=2),
    "method": lambda made, node: made.call_method("add", (node, 1)),
    "in-place method": lambda made, node: made.call_method("add_", (node, 1)),
    "list argument": call(torch.add, [1]),
    "tuple argument": call(torch.add, (1,)),
    "None": call(torch.add, None),
    "string": call(torch.add, "1"),
    "slice": call(operator.getitem, slice(None, 1, None)),
    "other slice": call(operator.getitem, slice(1, None, None)),
    "index": call(operator.getitem, 1),
    "ellipsis": call(operator.getitem, Ellipsis),
    "dtype": call(torch.Tensor.to, torch.float16),
    "other dtype": call(torch.Tensor.to, torch.bfloat16),
    "device": call(torch.Tensor.to, torch.device("cpu")),
    "other device": call(torch.Tensor.to, torch.device("meta")),
    "overload": call(torch.ops.aten.add.Scalar, 1),
    "other overload": call(torch.ops.aten.add.Tensor, 1),
    "returns its input": lambda made, node: node,
}


def test_all_these_differ() -> None:
    prints = {name: of(build) for name, build in {"base": BASE, **DIFFERENT}.items()}
    owners: dict[str, str] = {}
    for name, found in prints.items():
        assert owners.setdefault(found.digest, name) == name, f"{name} equals {owners[found.digest]}"


INPUTS = {
    "shape": torch.empty(4, 5),
    "rank": torch.empty(4),
    "dtype": torch.empty(4, 4, dtype=torch.float16),
    "stride": torch.empty(4, 4).t(),
    "gap in the stride": torch.empty(4, 8)[:, ::2],
    "expanded": torch.empty(1, 4).expand(4, 4),
    "device": torch.empty(4, 4, device="meta"),
    "layout": torch.empty(4, 4).to_sparse(),
}


@pytest.mark.parametrize("what", INPUTS)
def test_inputs_that_differ(what: str) -> None:
    assert of(BASE, INPUTS[what]) != of(BASE)


def test_equal_whatever_the_names() -> None:
    def build(first: str, second: str) -> fx.GraphModule:
        made = fx.Graph()
        node = made.placeholder(first)
        node.meta["example_value"] = torch.empty(4, 4)
        inner = made.create_node("call_function", torch.relu, (node,), name=second)
        made.output((made.call_function(torch.add, (inner, node)),))
        return fx.GraphModule({}, made)

    a, b = build("layers_3_weight", "relu_17"), build("x", "y")
    assert fingerprint(a) == fingerprint(b)
    assert hash(fingerprint(a)) == hash(fingerprint(b))
    assert fingerprint(a).lines == fingerprint(b).lines


def test_which_value_is_used_matters() -> None:
    def build(reverse: bool) -> fx.GraphModule:
        made = fx.Graph()
        nodes = [made.placeholder(name) for name in "ab"]
        for node in nodes:
            node.meta["example_value"] = torch.empty(4, 4)
        made.output((made.call_function(torch.sub, tuple(reversed(nodes)) if reverse else tuple(nodes)),))
        return fx.GraphModule({}, made)

    assert fingerprint(build(False)) != fingerprint(build(True))


def test_outputs_matter() -> None:
    def build(*order: int) -> fx.GraphModule:
        made = fx.Graph()
        node = made.placeholder("a")
        node.meta["example_value"] = torch.empty(4, 4)
        values = [made.call_function(op, (node,)) for op in (torch.relu, torch.exp)]
        made.output(tuple(values[i] for i in order))
        return fx.GraphModule({}, made)

    assert len({fingerprint(build(*order)) for order in ((0, 1), (1, 0), (0,), (0, 0), ())}) == 5


def marked(*shape: int) -> Tensor:
    """A tensor all of whose sizes are to be symbolic."""
    x = torch.randn(shape)
    for dim in range(len(shape)):
        torch._dynamo.mark_dynamic(x, dim)
    return x


def test_symbols_are_numbered_by_appearance() -> None:
    def turned(x: Tensor) -> Tensor:
        return x.relu().reshape(x.shape[1], x.shape[0])

    def turned_later(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The same, on symbols that are not the first of their trace."""
        return first + 1, second.relu().reshape(second.shape[1], second.shape[0])

    def relu_only(captured: Captured) -> tuple[str, Fingerprint]:
        """The one relu of a trace in a graph of its own, and the symbol that torch gave its first size."""
        (found,) = (node for node in captured.gm.graph.nodes if "relu" in str(node.target))
        size = found.meta["example_value"].shape[0]
        return str(size.node.expr), of(
            lambda made, node: made.call_method("relu", (node,)), found.meta["example_value"]
        )

    first, again = captured_print(turned, marked(3, 5)), captured_print(turned, marked(7, 2))
    assert first == again
    symbol, alone = capture(turned, [marked(3, 5)], relu_only)
    other_symbol, later = capture(turned_later, [marked(6, 4), marked(3, 5)], relu_only)
    assert symbol != other_symbol
    assert alone == later
    # Numbered, not wiped out: a square of symbolic size is not a rectangle.
    _, square = capture(lambda x: x.new_empty(x.shape[0], x.shape[0]).relu(), [marked(3, 5)], relu_only)
    assert square != alone


def test_symbolic_relations_are_kept() -> None:
    def same(x: Tensor, y: Tensor) -> Tensor:
        return x + 1, y + 1

    def inputs(first: int, second: int, dynamic: tuple[bool, bool]) -> list[Tensor]:
        tensors = [torch.randn(first), torch.randn(second)]
        for tensor, mark in zip(tensors, dynamic, strict=True):
            if mark:
                torch._dynamo.mark_dynamic(tensor, 0)
        return tensors

    both, one, none = (captured_print(same, *inputs(3, 5, d)) for d in ((True, True), (True, False), (False, False)))
    assert len({both, one, none}) == 3

    def equal_sizes(x: Tensor, y: Tensor) -> Tensor:
        torch._check(x.shape[0] == y.shape[0])
        return x + 1, y + 1

    assert captured_print(equal_sizes, *inputs(3, 3, (True, True))) != both


def test_tensor_constants_are_compared_by_value() -> None:
    def build(value: Tensor) -> fx.GraphModule:
        module = torch.nn.Module()
        module.register_buffer("constant", value)
        made = fx.Graph()
        node = made.placeholder("a")
        node.meta["example_value"] = torch.empty(4, 4)
        made.output((made.call_function(torch.add, (node, made.get_attr("constant"))),))
        return fx.GraphModule(module, made)

    one = fingerprint(build(torch.ones(4)))
    assert one == fingerprint(build(torch.ones(4)))
    assert one != fingerprint(build(torch.ones(4) * 2))
    assert one != fingerprint(build(torch.ones(4, dtype=torch.float64)))
    assert one != fingerprint(build(torch.ones(2, 2)))


def test_subgraphs_are_compared_by_their_own_fingerprint() -> None:
    def build(inner: Any) -> fx.GraphModule:
        module = torch.nn.Module()
        module.add_module("body", graph(call(inner)))
        made = fx.Graph()
        node = made.placeholder("a")
        node.meta["example_value"] = torch.empty(4, 4)
        made.output((made.call_function(map, (made.get_attr("body"), node)),))
        return fx.GraphModule(module, made)

    assert fingerprint(build(torch.relu)) == fingerprint(build(torch.relu))
    assert fingerprint(build(torch.relu)) != fingerprint(build(torch.exp))


def test_what_has_no_canonical_form_is_refused() -> None:
    class Opaque:
        def __repr__(self) -> str:
            return "None"  # so that FX can print it

    with pytest.raises(CaptureError, match="Opaque"):
        of(call(torch.add, Opaque()))


@pytest.mark.parametrize("pair", [(0.0, -0.0), (1, True), (1e-5, 1e-6), (float("nan"), float("inf"))], ids=str)
def test_close_constants(pair: tuple[Any, Any]) -> None:
    a, b = (of(call(torch.add, value)) for value in pair)
    assert a != b


@pytest.mark.parametrize("pair", [("a, b", ["a", "b"]), ("s0", "s1"), ((1, 2), (12,))], ids=str)
def test_constants_cannot_be_forged(pair: tuple[Any, Any]) -> None:
    """Text that looks like the canonical form, or like a symbol, is still text."""
    a, b = (of(call(torch.add, value)) for value in pair)
    assert a != b


def test_lambdas_of_one_module_are_not_taken_for_each_other() -> None:
    """Two functions may share module and qualified name; equal prints would run one in the other's place."""
    first, second = (lambda x: x + 1), (lambda x: x - 1)
    try:
        a, b = of(call(first)), of(call(second))
    except CaptureError:
        return
    assert a != b


def test_training_state_of_global_modes() -> None:
    """An inference tensor and a plain one compile differently."""
    with torch.inference_mode():
        special = torch.empty(4, 4)
    assert of(BASE, special) != of(BASE)
