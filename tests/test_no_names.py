"""A layer's identity never enters a graph: no string, and no integer, that differs between equal layers.

Each claim is checked under `hoisted`, where it must hold, and under `baked`, where it must not: so the check can fail.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import families
import glowplug
from glowplug.graph import capture as capture_room
from glowplug.ops import find_layer_op, moe_forward_shared


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return scale(self, x, 3, "again")


@glowplug.layer_op("test_no_names::scale", fake=lambda x, *_: torch.empty_like(x))
def scale(layer: Scale, x: Tensor, times: int, how: str) -> Tensor:
    """A custom op with constants that are the same in every layer."""
    return x * layer.factor * times


class Block(nn.Module):
    """A whole mixture-of-experts block, by the op that glowplug brings. Only ever traced here."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_experts = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return moe_forward_shared(self, x)


def constants(argument: Any) -> Iterator[Any]:
    """All leaves of a node's arguments that are not values of the graph."""
    if isinstance(argument, (tuple, list)):
        for item in argument:
            yield from constants(item)
    elif isinstance(argument, dict):
        for item in argument.values():
            yield from constants(item)
    elif isinstance(argument, slice):
        yield from (argument.start, argument.stop, argument.step)
    elif not isinstance(argument, fx.Node):
        yield argument


def calls(graphs: list[fx.Graph]) -> dict[str, list[tuple[Any, ...]]]:
    """Op -> the constants of each of its calls."""
    found: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    for graph in graphs:
        for node in graph.nodes:
            op = find_layer_op(node.target) if node.op == "call_function" else None
            if op is not None:
                found[op.name].append((*constants(node.args), *constants(node.kwargs)))
    return found


def names_in(graphs: list[fx.Graph], names: set[str]) -> set[str]:
    """Names of layers that occur in any string constant of any node."""
    strings = {
        text
        for graph in graphs
        for node in graph.nodes
        for text in constants((node.args, node.kwargs))
        if isinstance(text, str)
    }
    return {name for name in names for text in strings if name in text}


def module_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_modules() if name.count(".") >= 1 or name.isdigit()}


def run(model: nn.Module, *inputs: Tensor, **options: Any) -> None:
    glowplug.compile(model, compiler="eager", **options)
    with torch.no_grad():
        model(*inputs)
    assert glowplug.report(model).fallbacks == []


OPAQUE = {  # family, all of whose layers are alike from `skip` on -> the op that hides its experts
    "mixtral": "glowplug::moe_forward",
    "glm4_moe": "glowplug::moe_forward_shared",
}


@pytest.mark.parametrize("family", OPAQUE)
def test_ops_of_a_transformers_model(family: str, graphs: list[fx.Graph]) -> None:
    model = families.build(family, layers=4)
    run(model, families.prompt(), identity="hoisted", experts="opaque")
    found = calls(graphs)
    assert set(found) == {"glowplug::attention", "glowplug::kv_cache_update", OPAQUE[family]}
    for op, constants_of_calls in found.items():
        assert len(set(constants_of_calls)) == 1, f"{op} differs between layers: {set(constants_of_calls)}"
    assert len(found["glowplug::attention"]) == 4
    assert names_in(graphs, module_names(model)) == set()


@pytest.mark.parametrize("family", OPAQUE)
def test_baked_ops_of_a_transformers_model_are_told_apart(family: str, graphs: list[fx.Graph]) -> None:
    model = families.build(family, layers=4)
    run(model, families.prompt(), identity="baked", experts="opaque")
    for op, constants_of_calls in calls(graphs).items():
        assert len(set(constants_of_calls)) == len(constants_of_calls) > 1, op
    assert names_in(graphs, module_names(model))


def test_ordered_ops_carry_the_kind_alone(graphs: list[fx.Graph]) -> None:
    model = families.build("mixtral", layers=4)
    run(model, families.prompt(), identity="ordered", experts="opaque")
    for op, constants_of_calls in calls(graphs).items():
        assert len(set(constants_of_calls)) == 1, op
    assert names_in(graphs, module_names(model)) == set()


def test_constants_differ_between_kinds_only(graphs: list[fx.Graph]) -> None:
    """gpt_oss alternates two kinds of attention: two sets of constants, whatever the depth."""
    model = families.build("gpt_oss", layers=6)
    run(model, families.prompt(), identity="hoisted", experts="opaque")
    found = calls(graphs)
    attention = found["glowplug::attention"]
    assert len(attention) == 6
    assert attention[0] != attention[1]
    assert attention == attention[:2] * 3
    assert len(set(found["glowplug::kv_cache_update"])) == 1
    assert len(set(found["glowplug::moe_forward"])) == 1


@pytest.mark.parametrize("layer", [Scale, Block])
def test_ops_of_a_plain_module(layer: type[nn.Module], graphs: list[fx.Graph]) -> None:
    model, x = nn.Sequential(*(layer() for _ in range(4))).eval(), torch.randn(2, 8)
    for identity in ("hoisted", "baked"):
        graphs.clear()
        registry = glowplug.register_layers(model, identity=identity)
        with torch.no_grad():
            torch.compile(model, backend=_traced_only)(x)
        ((op, constants_of_calls),) = calls(graphs).items()
        assert op in ("test_no_names::scale", "glowplug::moe_forward_shared")
        assert len(constants_of_calls) == 4
        assert len(set(constants_of_calls)) == (1 if identity == "hoisted" else 4)
        assert len(registry) >= 4


def _traced_only(gm: fx.GraphModule, inputs: Any) -> Any:
    """A backend that has the graph described, and answers with the first input: what is traced matters here."""
    capture_room.describe(gm)
    return lambda *arguments: [next(a for a in arguments if isinstance(a, Tensor))]


@pytest.mark.parametrize("experts", ["inline", "opaque"])
def test_pieces_are_as_many_at_any_depth(experts: str) -> None:
    """Any constant that differs between layers, in any op, would make another piece."""
    counts = []
    for layers in (4, 8):
        model = families.build("gpt_oss", layers=layers)
        run(model, families.prompt(), experts=experts)
        counts.append(glowplug.report(model).distinct_pieces)
    assert counts[0] == counts[1]


def test_baked_pieces_grow_with_depth() -> None:
    counts = []
    for layers in (4, 8):
        model = families.build("gpt_oss", layers=layers)
        run(model, families.prompt(), identity="baked", experts="opaque")
        counts.append(glowplug.report(model).distinct_pieces)
    assert counts[1] == counts[0] + 4
