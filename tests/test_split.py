"""Cutting a graph: nothing is lost, sizes stay inside pieces, and two ops that follow each other touch."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import glowplug
from glowplug.errors import CaptureError
from glowplug.graph.capture import Captured, capture
from glowplug.graph.fingerprint import fingerprint
from glowplug.graph.split import OpStep, Piece, Step, may_mutate, split
from glowplug.program import PieceCache, Program, build_program
from glowplug.report import Report


class Cut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return cut(self, x)


@glowplug.layer_op("test_split::cut", fake=lambda x: torch.empty_like(x), splitting=True)
def cut(layer: Cut, x: Tensor) -> Tensor:
    """A cut of one output."""
    return x + layer.shift


@glowplug.layer_op("test_split::pair", fake=lambda x, _y: (torch.empty_like(x), torch.empty_like(x)), splitting=True)
def pair(layer: Cut, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A cut of two outputs."""
    return x + layer.shift, x - y


@glowplug.layer_op("test_split::scribble", fake=lambda _x: None, splitting=True, mutates=("x",))
def scribble(layer: Cut, x: Tensor) -> None:
    """A cut that writes to its argument and returns nothing."""
    x.mul_(layer.shift)


class Net(nn.Module):
    """Two layers to cut at; the tests' functions take it as `net`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Cut(), Cut()


@pytest.fixture
def net() -> Net:
    made = Net().eval()
    made.__dict__["registry"] = glowplug.register_layers(made)
    return made


def dynamic(*shape: int) -> Tensor:
    x = torch.randn(shape)
    torch._dynamo.mark_dynamic(x, 0)
    return x


def steps_of(fn: Callable[..., Any], *args: Any) -> list[Step]:
    assert isinstance(fn, types.FunctionType)
    return capture(fn, args, lambda captured: split(captured)[0])


def pieces_of(fn: Callable[..., Any], *args: Any) -> list[Piece]:
    return [step for step in steps_of(fn, *args) if isinstance(step, Piece)]


class Runner:
    """A captured function as a program, callable with other inputs of the same structure."""

    def __init__(self, fn: Callable[..., Any], *args: Any) -> None:
        self.names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
        self.report = Report()

        def consume(captured: Captured) -> Program:
            return build_program(
                captured,
                compiler=glowplug.compilers.get_compiler("eager"),
                report=self.report,
                cache=PieceCache(),
                arguments={entry.node: entry.source for entry in captured.inputs if entry.type != "handle"},
                bound={entry.node: entry.value for entry in captured.inputs if entry.type == "handle"},
            ).program

        self.program = capture(fn, args, consume)  # type: ignore[arg-type]

    def __call__(self, *args: Any) -> Any:
        given = {"L": dict(zip(self.names, args, strict=True))}
        with torch.no_grad():
            return self.program.run(*(eval(source, given) for source in self.program.arguments))


def same(fn: Callable[..., Any], net: Net, *shapes: tuple[int, ...]) -> Runner:
    """Capture at one size, run at others, compare outputs and inputs with eager."""
    runner = Runner(fn, net, *(dynamic(*shape) for shape in shapes))
    for rows in (shapes[0][0], 2, 1, 9):
        inputs = [torch.randn(rows, *shape[1:]) for shape in shapes]
        copies = [x.clone() for x in inputs]
        with torch.no_grad():
            expected = fn(net, *copies)
        actual = runner(net, *inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other)
        for one, other in zip(inputs, copies, strict=True):
            assert torch.equal(one, other), "an input was left in another state than by eager"
    return runner


# -- in-place operations ------------------------------------------------


def add_in_place(net: Net, x: Tensor) -> Tensor:
    y = x * 2
    y.add_(1)  # nobody reads what this returns
    return cut(net.a, y) + y


def set_item(net: Net, x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1] = 7.0
    y[0] *= 3
    return cut(net.a, y)


def write_to_input(net: Net, x: Tensor) -> Tensor:
    before = x + 0
    x.mul_(2)
    after = cut(net.a, x)
    x.sub_(1)
    return before + after


def write_after_cut(net: Net, x: Tensor) -> Tensor:
    y = x * 2
    z = cut(net.a, y)
    y.add_(100)
    return cut(net.b, y) + z


def write_to_view_of_earlier_piece(net: Net, x: Tensor) -> Tensor:
    y = x * 2
    half = y[:, :2]
    z = cut(net.a, x)
    half.zero_()
    return y + z


def augmented(net: Net, x: Tensor) -> Tensor:
    y = x * 2
    y += 1
    z = cut(net.a, y)
    z -= 1
    z /= 3
    return z


def copy_and_fill(net: Net, x: Tensor) -> Tensor:
    buffer = torch.zeros_like(x)
    buffer.copy_(x)
    buffer[1:].fill_(5)
    z = cut(net.a, x)
    torch.add(z, 1, out=buffer)
    return cut(net.b, buffer)


def op_that_writes(net: Net, x: Tensor) -> Tensor:
    y = x * 2
    scribble(net.a, y)
    return y + 1


def read_before_op_writes(net: Net, x: Tensor) -> Tensor:
    """What is computed between the two cuts must not move in front of the first, which writes to its operand."""
    y = x * 2
    scribble(net.a, y)
    z = y + 1
    return cut(net.b, z) + y


def write_between_ops(net: Net, x: Tensor) -> Tensor:
    """The gap holds a write to what the first op reads: it must not move in front."""
    y = x * 2
    z = cut(net.a, y)
    y.add_(1)
    return cut(net.b, x) + y + z


def function_writes_between_ops(net: Net, x: Tensor) -> Tensor:
    y = x * 2
    z = cut(net.a, y)
    torch.relu_(y)
    return cut(net.b, x) + y + z


def activation_writes_between_ops(net: Net, x: Tensor) -> Tensor:
    y = x * 2
    z = cut(net.a, y)
    torch.nn.functional.silu(y, inplace=True)
    return cut(net.b, x) + y + z


IN_PLACE = (
    add_in_place,
    set_item,
    write_to_input,
    write_after_cut,
    write_to_view_of_earlier_piece,
    augmented,
    copy_and_fill,
    op_that_writes,
    read_before_op_writes,
    write_between_ops,
    function_writes_between_ops,
    activation_writes_between_ops,
)


@pytest.mark.parametrize("fn", IN_PLACE, ids=lambda fn: fn.__name__)
def test_in_place_operations_are_kept(fn: Callable[..., Any], net: Net) -> None:
    same(fn, net, (3, 4))


# -- where it is cut ------------------------------------------------


def plain(net: Net, x: Tensor) -> Tensor:
    y = torch.relu(x) + 1
    y = cut(net.a, y)
    y = torch.relu(y) + 1
    y = cut(net.b, y)
    return torch.relu(y) + 1


def test_pieces_and_ops_alternate(net: Net) -> None:
    steps = steps_of(plain, net, dynamic(3, 4))
    assert [type(step) for step in steps] == [Piece, OpStep, Piece, OpStep, Piece]
    assert [step.op.name for step in steps if isinstance(step, OpStep)] == ["test_split::cut"] * 2
    prints = {fingerprint(step.gm) for step in steps if isinstance(step, Piece)}
    assert len(prints) == 1
    assert same(plain, net, (3, 4)).report.distinct_pieces == 1


def test_no_op_one_piece(net: Net) -> None:
    def nothing_to_cut(net: Net, x: Tensor) -> Tensor:
        return x + 1

    (piece,) = steps_of(nothing_to_cut, net, dynamic(3, 4))
    assert isinstance(piece, Piece)
    same(nothing_to_cut, net, (3, 4))


def back_to_back(net: Net, x: Tensor) -> Tensor:
    return cut(net.b, cut(net.a, x * 2)) * 3


def independent_gap(net: Net, x: Tensor) -> Tensor:
    y = x * 2
    first = cut(net.a, y)
    other = y.relu() + 1  # does not need `first`
    second = cut(net.b, other)
    return first + second


def test_nothing_between_ops_that_follow_each_other(net: Net) -> None:
    assert [type(step) for step in steps_of(back_to_back, net, dynamic(3, 4))] == [Piece, OpStep, OpStep, Piece]
    same(back_to_back, net, (3, 4))


def test_a_gap_that_does_not_depend_on_the_op_closes(net: Net) -> None:
    assert [type(step) for step in steps_of(independent_gap, net, dynamic(3, 4))] == [Piece, OpStep, OpStep, Piece]
    same(independent_gap, net, (3, 4))


@pytest.mark.parametrize("function", [operator.and_, operator.or_, operator.not_, operator.add, torch.add, torch.relu])
def test_what_writes_to_nothing(function: Callable[..., Any]) -> None:
    graph = fx.Graph()
    assert not may_mutate(graph.call_function(function, (graph.placeholder("x"),)))


def test_a_gap_that_depends_on_the_op_stays(net: Net) -> None:
    assert sum(isinstance(step, Piece) for step in steps_of(plain, net, dynamic(3, 4))) == 3


# -- what crosses ------------------------------------------------


def uses_sizes(net: Net, x: Tensor) -> Tensor:
    rows = x.shape[0]
    y = cut(net.a, x * rows)
    y = y.reshape(rows * 2, 2) / rows
    y = cut(net.b, y.reshape(rows, 4))
    return y + rows + torch.ones(rows * 2, 2).sum()


def test_sizes_do_not_cross(net: Net) -> None:
    pieces = pieces_of(uses_sizes, net, dynamic(3, 4))
    for piece in pieces:
        inputs = [node.meta["example_value"] for node in piece.gm.graph.nodes if node.op == "placeholder"]
        assert all(isinstance(value, Tensor) for value in inputs), piece.gm.code
        (output,) = (node for node in piece.gm.graph.nodes if node.op == "output")
        assert all(isinstance(node.meta["example_value"], Tensor) for node in output.args[0])
    same(uses_sizes, net, (3, 4))


def size_of_a_value_of_another_piece(net: Net, x: Tensor) -> Tensor:
    y = torch.cat([x, x, x])
    z = cut(net.a, x)
    return z.sum() * y.shape[0] + z


def test_size_of_what_lies_in_another_piece(net: Net) -> None:
    same(size_of_a_value_of_another_piece, net, (3, 4))


def skips_a_cut(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    early = x.exp()
    z = cut(net.b, cut(net.a, x + 1).relu())
    return z + early, early


def test_values_may_skip_a_cut(net: Net) -> None:
    same(skips_a_cut, net, (3, 4))


def two_outputs(net: Net, x: Tensor, y: Tensor) -> Tensor:
    first, second = pair(net.a, x + 1, y)
    _unused, third = pair(net.b, first * 2, second)
    return third - second


def test_ops_of_two_outputs(net: Net) -> None:
    same(two_outputs, net, (3, 4), (3, 4))
    steps = [step for step in steps_of(two_outputs, net, dynamic(3, 4), dynamic(3, 4)) if isinstance(step, OpStep)]
    assert [step.single for step in steps] == [False, False]
    assert steps[1].outputs[0] is None  # nobody reads it


def unpacked_twice(net: Net, x: Tensor, y: Tensor) -> Tensor:
    both = pair(net.a, x, y)
    return both[0] + both[1] * both[0] - both[1]


def test_outputs_unpacked_twice(net: Net) -> None:
    same(unpacked_twice, net, (3, 4), (3, 4))


def size_from_data(net: Net, x: Tensor) -> Tensor:
    length = int((x > 0).sum().item())
    return cut(net.a, x) + torch.ones(length).sum()


def test_sizes_that_depend_on_data_are_right_or_refused(net: Net) -> None:
    try:
        Runner(size_from_data, net, dynamic(3, 4))
    except CaptureError:
        return
    same(size_from_data, net, (3, 4))


def test_several_outputs_in_order(net: Net) -> None:
    def many(net: Net, x: Tensor) -> tuple[Tensor, ...]:
        y = cut(net.a, x + 1)
        return y.relu(), x.exp(), y, x + 1

    same(many, net, (3, 4))


def test_equal_pieces_have_equal_signatures(net: Net) -> None:
    """Inputs come in the order of use, not of the graph: the order in which weights were met says nothing."""

    def swapped(net: Net, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        y = cut(net.a, x * u + v)
        return cut(net.b, y * v + u) * 1

    runner = same(swapped, net, (3, 4), (3, 4), (3, 4))
    assert runner.report.pieces == 3
    assert runner.report.distinct_pieces == 2


def test_an_output_that_is_a_size_is_right_or_refused(net: Net) -> None:
    def returns_a_size(net: Net, x: Tensor) -> tuple[Tensor, int]:
        return cut(net.a, x), x.shape[0] * 2

    try:
        runner = Runner(returns_a_size, net, dynamic(3, 4))
    except CaptureError:
        return
    x = torch.randn(5, 4)
    assert runner(net, x)[1] == 10


def test_dtype_and_device_of_every_output_are_kept(net: Net) -> None:
    def mixed(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        y = cut(net.a, x).to(torch.float64)
        return y * 2, (y > 0)

    same(mixed, net, (3, 4))
