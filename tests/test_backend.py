"""The doors for plain modules: `torch.compile(backend="glowplug")` and `glowplug.compile` of any `nn.Module`."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glowplug
from glowplug import NotServableError, Report, UsageError
from glowplug.backend import glowplug_backend


class Router(nn.Module):
    """A layer behind a splitting op."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size))
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return route(self, x)


@glowplug.layer_op("test_backend::route", fake=lambda x: torch.empty_like(x), splitting=True)
def route(layer: Router, x: Tensor) -> Tensor:
    """Reads a weight and a plain attribute at run time."""
    return torch.sin(x @ layer.weight) * layer.scale


class Net(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Router()) for _ in range(depth))
        self.gain = 2.0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) + x
        return x * self.gain


class Broken:
    """A compiler that fails."""

    name = "broken"

    def compile(self, piece: Any, inputs: Any) -> Any:
        raise RuntimeError("no such instruction")


class Breaks(Net):
    """A net whose forward Dynamo can't trace in one graph."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        torch._dynamo.graph_break()
        return super().forward(x * 0.1)


def eager(model: nn.Module, *args: Tensor) -> Any:
    with torch.no_grad():
        return type(model).forward(model, *args)


def quiet(model: nn.Module, *args: Tensor) -> Any:
    with torch.no_grad():
        return model(*args)


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 8)


# -- through the entry point ------------------------------------------------


def test_torch_finds_the_backend() -> None:
    assert "glowplug" in torch.compiler.list_backends()


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """What other tests traced of the same classes must not count here."""
    torch._dynamo.reset()


def test_backend_by_name(net: Net, x: Tensor) -> None:
    registry, report = glowplug.register_layers(net), Report()
    compiled = torch.compile(net, backend="glowplug", options={"compiler": "eager", "report": report})
    assert torch.equal(quiet(compiled, x), eager(net, x))
    assert report.programs == 1
    assert report.pieces == 4
    assert report.distinct_pieces == 3
    assert report.fallbacks == []
    assert len(registry) > 3


def test_backend_traces_again_for_other_sizes(net: Net) -> None:
    registry = glowplug.register_layers(net)
    compiled = torch.compile(net, backend="glowplug", options={"compiler": "eager"})
    for rows in (4, 5, 1, 9, 4):
        x = torch.randn(rows, 8)
        assert torch.equal(quiet(compiled, x), eager(net, x))
    assert registry.identity == "hoisted"


def test_a_model_without_ops_is_one_piece(x: Tensor) -> None:
    report, plain = Report(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    compiled = torch.compile(plain, backend="glowplug", options={"compiler": "eager", "report": report})
    assert torch.equal(quiet(compiled, x), eager(plain, x))
    assert (report.pieces, report.distinct_pieces) == (1, 1)


@pytest.mark.parametrize("dynamic", [True, False, None])
def test_a_graph_that_returns_sizes(dynamic: bool | None) -> None:
    def fn(x: Tensor) -> tuple[Tensor, int, Tensor]:
        return x * 2, x.shape[0] * 3, x

    compiled = torch.compile(fn, backend="glowplug", dynamic=dynamic, options={"compiler": "eager"})
    for rows in (4, 5, 7):
        x = torch.randn(rows, 8)
        doubled, size, same = compiled(x)
        assert torch.equal(doubled, x * 2)
        assert size == rows * 3
        assert same is x


def test_sizes_across_a_graph_break() -> None:
    def fn(x: Tensor) -> Tensor:
        rows = x.shape[0] + 1
        y = x * rows
        torch._dynamo.graph_break()
        return y + rows

    compiled = torch.compile(fn, backend="glowplug", dynamic=True, options={"compiler": "eager"})
    for rows in (4, 5, 7):
        x = torch.randn(rows, 8)
        assert torch.equal(compiled(x), fn(x))


def test_unknown_option_and_mode(x: Tensor) -> None:
    for options, word in (({"speed": 11}, "speed"), ({"compiler": "warp"}, "warp"), ({"compiler": 3}, "compiler")):
        with pytest.raises(Exception, match=word) as caught:
            torch.compile(nn.Linear(8, 8), backend="glowplug", options=options)(x)
        assert "options are compiler, report" in str(caught.value) or "compiler" in str(caught.value)
    with pytest.raises(Exception, match="not supported"):
        torch.compile(nn.Linear(8, 8), backend="glowplug", mode="max-autotune")(x)
    with pytest.raises(UsageError, match="speed"):
        glowplug_backend(torch.fx.symbolic_trace(nn.Linear(8, 8)), [x], options={"speed": 11})


def test_gradients_through_the_backend(net: Net, x: Tensor) -> None:
    registry, report = glowplug.register_layers(net), Report()
    compiled = torch.compile(net, backend="glowplug", options={"compiler": "eager", "report": report})
    x.requires_grad_()
    compiled(x).sum().backward()
    actual = [x.grad, *(parameter.grad for parameter in net.parameters())]
    expected = torch.autograd.grad(Net.forward(net, x).sum(), [x, *net.parameters()])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert "grad mode" in report.fallbacks[0].reason
    assert len(registry) > 3
    # The same compiled module serves without gradients, compiled, and with them again.
    assert torch.equal(quiet(compiled, x), eager(net, x))
    assert report.programs == 1


def test_gradients_of_inputs_alone(net: Net, x: Tensor) -> None:
    registry = glowplug.register_layers(net)
    compiled = torch.compile(net.requires_grad_(False), backend="glowplug", options={"compiler": "eager"})
    x.requires_grad_()
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(Net.forward(net, x).sum(), x)[0])
    assert len(registry) > 3


# -- glowplug.compile of a plain module ------------------------------------------------


def test_plain_module(net: Net, x: Tensor) -> None:
    assert torch.equal(quiet(glowplug.compile(net, compiler="eager"), x), eager(net, x))
    report = glowplug.report(net)
    assert (report.strategy, report.compiler, report.pieces, report.distinct_pieces) == ("hoisted", "eager", 4, 3)
    assert report.fallbacks == []


@pytest.mark.parametrize("identity", ["hoisted", "ordered", "baked"])
def test_every_size_is_right(identity: str, net: Net) -> None:
    glowplug.compile(net, compiler="eager", identity=identity)
    for rows in (4, 1, 7, 7, 3, 0):
        x = torch.randn(rows, 8)
        assert torch.equal(quiet(net, x), eager(net, x)), rows


def test_a_piece_compiler_of_ones_own(net: Net, x: Tensor, counting: Any) -> None:
    glowplug.compile(net, compiler=counting)
    quiet(net, x)
    quiet(net, x)
    assert counting.compiled == glowplug.report(net).distinct_pieces == 3
    assert counting.ran == 8
    assert glowplug.report(net).compiler == "counting"


def test_a_compiler_that_fails_costs_speed_and_nothing_else(net: Net, x: Tensor) -> None:
    glowplug.compile(net, compiler=Broken())
    assert torch.equal(quiet(net, x), eager(net, x))
    (fallback,) = glowplug.report(net).fallbacks
    assert "no such instruction" in fallback.reason
    glowplug.compile(net, compiler=Broken(), strict=True)
    with pytest.raises(glowplug.GlowplugError, match="no such instruction"):
        quiet(net, x)


def test_graph_breaks_are_reported(x: Tensor) -> None:
    model = Breaks().eval()
    glowplug.compile(model, compiler="eager")
    for _ in range(3):
        assert torch.equal(quiet(model, x), eager(model, x))
    report = glowplug.report(model)
    assert report.programs == 2
    (fallback,) = report.fallbacks
    assert "broke the graph" in fallback.reason


def test_graph_breaks_of_a_second_model_are_reported_too(x: Tensor) -> None:
    for model in (Breaks().eval(), Breaks().eval()):
        glowplug.compile(model, compiler="eager")
        assert torch.equal(quiet(model, x), eager(model, x))
        assert len(glowplug.report(model).fallbacks) == 1


def test_graph_breaks_under_strict(x: Tensor) -> None:
    model = glowplug.compile(Breaks().eval(), compiler="eager", strict=True)
    with pytest.raises(Exception, match=r"graph.break"):
        quiet(model, x)


def test_gradients_of_a_plain_module(net: Net, x: Tensor) -> None:
    glowplug.compile(net, compiler="eager")
    for _ in range(2):
        net(x).sum().backward()
    expected = torch.autograd.grad(Net.forward(net, x).sum(), list(net.parameters()))
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    (fallback,) = glowplug.report(net).fallbacks
    assert "grad mode" in fallback.reason


def test_gradients_under_strict(net: Net, x: Tensor) -> None:
    glowplug.compile(net, compiler="eager", strict=True)
    with pytest.raises(NotServableError, match="grad mode"):
        net(x)
    assert torch.equal(quiet(net, x), eager(net, x))
    with pytest.raises(NotServableError, match="grad"):
        net.requires_grad_(False)(x.requires_grad_())


def change_gain(net: Net) -> None:
    net.gain = 3.0


def change_scale_behind_the_op(net: Net) -> None:
    net.layers[1][2].scale = 5.0


def change_weight_in_place(net: Net) -> None:
    with torch.no_grad():
        net.layers[1][2].weight.mul_(2)


def change_data(net: Net) -> None:
    net.layers[0][0].weight.data = torch.randn(8, 8)


def replace_parameter(net: Net) -> None:
    net.layers[1][2].weight = nn.Parameter(torch.randn(8, 8))


def replace_linear(net: Net) -> None:
    net.layers[1][0] = nn.Linear(8, 8)


def replace_router(net: Net) -> None:
    net.layers[1][2] = Router()


def add_hook(net: Net) -> None:
    net.layers[1].register_forward_hook(lambda module, args, output: output + 1)


def drop_layer(net: Net) -> None:
    net.layers = net.layers[:2]


def swap_layers(net: Net) -> None:
    net.layers[0], net.layers[1] = net.layers[1], net.layers[0]


def to_double(net: Net) -> None:
    net.to(torch.float64)


def load(net: Net) -> None:
    net.load_state_dict(Net().state_dict(), assign=True)


CHANGES = [
    change_gain,
    change_scale_behind_the_op,
    change_weight_in_place,
    change_data,
    replace_parameter,
    replace_linear,
    replace_router,
    add_hook,
    drop_layer,
    swap_layers,
    to_double,
    load,
]


@pytest.mark.parametrize("identity", ["hoisted", "ordered", "baked"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_module_is_never_stale(change: Any, identity: str, net: Net, x: Tensor) -> None:
    """Right answers for the module as it is now; or a clear error, never the module as it was."""
    glowplug.compile(net, compiler="eager", identity=identity)
    before = quiet(net, x)
    change(net)
    given = x.double() if change is to_double else x
    expected = eager(net, given)
    assert change is to_double or not torch.equal(expected, before)
    try:
        output = quiet(net, given)
    except glowplug.GlowplugError as error:
        assert identity != "hoisted" or change in (replace_router,), error
    else:
        assert torch.equal(output, expected)
    glowplug.compile(net, compiler="eager", identity=identity)
    assert torch.equal(quiet(net, given), expected)


def test_copies_and_pickles(net: Net, x: Tensor) -> None:
    glowplug.compile(net, compiler="eager")
    before = quiet(net, x)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(quiet(twin, x), before)
        for parameter in twin.parameters():
            parameter.data.mul_(0.5)
        assert torch.equal(quiet(twin, x), eager(twin, x))
        assert not torch.equal(quiet(twin, x), before)
        assert glowplug.report(twin) is not glowplug.report(net)
    assert torch.equal(quiet(net, x), before)


@pytest.mark.inductor
def test_a_number_that_changes_with_inductor(net: Net, x: Tensor) -> None:
    """Dynamo makes a float that changed an input of the graph: no size, no tensor."""
    glowplug.compile(net)
    for net.gain in (2.0, 3.0, 4.5):
        torch.testing.assert_close(quiet(net, x), eager(net, x), rtol=1e-4, atol=1e-4)
    assert glowplug.report(net).fallbacks == []


@pytest.mark.inductor
def test_with_inductor(net: Net) -> None:
    glowplug.compile(net)
    for rows in (4, 6, 9):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(quiet(net, x), eager(net, x), rtol=1e-4, atol=1e-4)
    report = glowplug.report(net)
    assert report.compiler == "inductor"
    assert report.fallbacks == []
