"""`@layer_op` on plain modules: the call finds its own layer, whatever names, orders and copies there are."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glowplug
from glowplug.errors import LayerLookupError, LayerOrderError, UsageError
from glowplug.ops import find_layer_op, known_layer_ops

IDENTITIES = ("hoisted", "ordered", "baked")


class Mix(nn.Module):
    """A layer whose work is behind an op, and whose output depends on its own weight."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size))
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        return mix(self, x)


@glowplug.layer_op("test_layer_op::mix", fake=lambda x: torch.empty_like(x))
def mix(layer: Mix, x: Tensor) -> Tensor:
    """An opaque body."""
    return torch.tanh(x @ layer.weight)


class Split(Mix):
    def forward(self, x: Tensor) -> Tensor:
        low, high = halves(self, x, 2.0)
        return torch.cat([high, low], dim=-1)


@glowplug.layer_op(
    "test_layer_op::halves",
    fake=lambda x, _scale: (x.new_empty(x.shape[0], x.shape[1] // 2), x.new_empty(x.shape[0], x.shape[1] // 2)),
    splitting=True,
)
def halves(layer: Split, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Two outputs, a plain argument, and a cut in the graph."""
    low, high = (scale * (x @ layer.weight)).chunk(2, dim=-1)
    return low.contiguous(), high.contiguous()


class Accumulate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        total = x + 1
        accumulate(self, total, x)
        return total * 2


@glowplug.layer_op("test_layer_op::accumulate", fake=lambda _total, _x: None, mutates=("total",))
def accumulate(layer: Accumulate, total: Tensor, x: Tensor) -> None:
    """Writes to its argument and returns nothing."""
    total.add_(x * layer.step)


class Bare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return bare(self, x)


@glowplug.layer_op("test_layer_op::bare", fake=lambda x: torch.empty_like(x))
def bare(layer: nn.Module, x: Tensor) -> Tensor:
    """An op whose annotation does not say which layers call it."""
    return x * 2


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return many(self, [x, x + 1], None, 3, "add") - many(self, [x], x, 1, "sub")


@glowplug.layer_op("test_layer_op::many", fake=lambda parts, *_: torch.empty_like(parts[0]), splitting=True)
def many(layer: Many, parts: list[Tensor], extra: Tensor | None, times: int, how: str) -> Tensor:
    """A list, an optional tensor, and plain arguments."""
    total = sum(parts) * times + layer.bias
    if extra is not None:
        total = total + extra
    return total if how == "add" else -total


class Stack(nn.Module):
    """Layers run in `order`: a plain list, so any order, repetition or omission."""

    def __init__(self, layer: type[nn.Module] = Mix, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(depth))
        self.order = list(range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = self.layers[index](x) + x
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


def passes_on(layer: Mix, x: Tensor) -> Tensor:
    """The body of an op that must not come to be."""
    return x


def refusal(name: str = "test_layer_op::never", fn: Any = passes_on, mutates: tuple[str, ...] = ()) -> str:
    """The message of the UsageError that a definition raises; nothing may be left registered."""
    before = known_layer_ops()
    with pytest.raises(UsageError) as caught:
        glowplug.layer_op(name, fake=lambda x: x, mutates=mutates)(fn)
    assert known_layer_ops() == before
    return str(caught.value)


# -- outside a trace ------------------------------------------------


def test_eager_call_is_the_plain_function() -> None:
    layer, x = Mix(), torch.randn(3, 4)
    assert torch.equal(mix(layer, x), torch.tanh(x @ layer.weight))
    assert not hasattr(layer, "_glowplug_handle")  # nobody registered it, and nobody had to


def test_eager_call_passes_gradients() -> None:
    layer, x = Mix(), torch.randn(3, 4)
    mix(layer, x).sum().backward()
    expected = torch.autograd.grad(torch.tanh(x @ layer.weight).sum(), layer.weight)[0]
    assert torch.equal(layer.weight.grad, expected)


def test_decorated_function_keeps_its_name_and_record() -> None:
    assert mix.__name__ == "mix"
    assert mix.__doc__ == "An opaque body."
    assert mix.layer_op.name == "test_layer_op::mix"
    assert mix.layer_op.layer_type is Mix
    assert not mix.layer_op.splitting
    assert halves.layer_op.splitting
    assert mix.layer_op in known_layer_ops()


def test_find_layer_op_knows_overloads_and_nothing_else() -> None:
    for identity in IDENTITIES:
        assert find_layer_op(getattr(torch.ops.test_layer_op.mix, identity)) is mix.layer_op
    assert find_layer_op(torch.ops.aten.add.Tensor) is None
    assert find_layer_op([]) is None


# -- three identities, one answer ------------------------------------------------


@pytest.mark.parametrize("layer", [Mix, Split, Accumulate])
@pytest.mark.parametrize("depth", [1, 4])
def test_every_identity_gives_eagers_output(layer: type[nn.Module], depth: int) -> None:
    model, x = Stack(layer, depth).eval(), torch.randn(3, 4)
    expected = eager(model, x)
    outputs = {identity: compiled(model, x, identity=identity) for identity in IDENTITIES}
    for identity, output in outputs.items():
        torch.testing.assert_close(output, expected, rtol=0, atol=0, msg=identity)
    for a, b in itertools.combinations(outputs.values(), 2):
        assert torch.equal(a, b)
    assert glowplug.report(model).fallbacks == []
    # The test could fail: another layer in the place of one changes the answer.
    if depth > 1:
        model.order[0] = 1
        assert not torch.equal(eager(model, x), expected)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("identity", ["hoisted", "baked"])
def test_any_order_of_calls(identity: str, seed: int) -> None:
    model, x = Stack(depth=5).eval(), torch.randn(2, 4)
    model.order = random.Random(seed).choices(range(5), k=7)
    assert torch.equal(compiled(model, x, identity=identity), eager(model, x))


@pytest.mark.parametrize(
    "order", [[0, 1, 2, 3], [3, 1, 0, 2], [0, 2, 2, 3], [0, 1, 2], [0, 0, 1, 2, 3], [], [1, 0, 2, 3]], ids=str
)
def test_ordered_is_right_or_refuses(order: list[int]) -> None:
    model, x = Stack(depth=4).eval(), torch.randn(2, 4)
    model.order = order
    try:
        output = compiled(model, x, identity="ordered")
    except LayerOrderError as error:
        assert order not in ([0, 1, 2, 3], [])
        assert 'identity="hoisted"' in str(error)
    else:
        assert torch.equal(output, eager(model, x))


def test_ordered_needs_the_layers_class() -> None:
    model, x = nn.Sequential(Bare(), Bare()).eval(), torch.randn(2, 4)
    with pytest.raises(UsageError, match="annotate the first parameter"):
        compiled(model, x, identity="ordered")
    assert torch.equal(compiled(model, x, identity="hoisted"), x * 4)


def test_mutation_reaches_the_callers_tensor() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Accumulate()

        def forward(self, total: Tensor, x: Tensor) -> Tensor:
            accumulate(self.layer, total, x)
            return x + 0

    model, x = Outer().eval(), torch.randn(2, 4)
    for identity in IDENTITIES:
        total, wanted = torch.zeros(2, 4), x * model.layer.step
        glowplug.compile(model, compiler="eager", identity=identity)
        with torch.no_grad():
            model(total, x)
        assert torch.equal(total, wanted), identity


@pytest.mark.parametrize("depth", [2, 6])
def test_splitting_cuts_and_equal_layers_share_pieces(depth: int) -> None:
    model, x = Stack(Split, depth).eval(), torch.randn(2, 4)
    compiled(model, x)
    report = glowplug.report(model)
    assert report.pieces == depth  # one after each cut; the first op reads the model's input as it is
    assert report.distinct_pieces == 1


def test_optional_and_list_arguments() -> None:
    model, x = nn.Sequential(Many(), Many()).eval(), torch.randn(2, 4)
    expected = eager(model, x)
    for identity in ("hoisted", "baked"):
        assert torch.equal(compiled(model, x, identity=identity), expected), identity
    with pytest.raises(LayerOrderError):  # each layer calls the op twice
        compiled(model, x, identity="ordered")


# -- definitions that must not succeed ------------------------------------------------


@pytest.mark.parametrize("name", ["", "mix", "a::", "::b", "a:b", "a::b::c", "a b::c", "a::1b", "a.b::c"])
def test_bad_name(name: str) -> None:
    assert repr(name) in refusal(name)


def test_duplicate_name() -> None:
    assert "'test_layer_op::mix' is already registered" in refusal("test_layer_op::mix")


def test_schema_that_cannot_be_inferred() -> None:
    def no_annotation(layer: Mix, x) -> Tensor:  # type: ignore[no-untyped-def]
        return x

    def unknown_type(layer: Mix, x: set) -> Tensor:  # type: ignore[type-arg]
        return torch.zeros(1)

    def no_layer() -> Tensor:
        return torch.zeros(1)

    for fn in (no_annotation, unknown_type):
        message = refusal("test_layer_op::bad_schema", fn)
        assert "test_layer_op::bad_schema" in message
        assert "annotations" in message
    assert "first parameter must be the layer" in refusal("test_layer_op::no_layer", no_layer)


def test_annotation_that_names_nothing() -> None:
    class Local(nn.Module):
        pass

    def body(layer: Local, x: Tensor) -> Tensor:  # its annotation, a string, can't be looked up from outside
        return x

    assert "Local" in refusal("test_layer_op::local", body)


def test_mutates_must_name_a_parameter() -> None:
    assert "nothing_of_that_name" in refusal(mutates=("nothing_of_that_name",))


def test_a_failed_definition_leaves_the_name_free() -> None:
    def bad(layer: Mix, x) -> Tensor:  # type: ignore[no-untyped-def]
        return x

    refusal("test_layer_op::second_try", bad)

    @glowplug.layer_op("test_layer_op::second_try", fake=lambda x: torch.empty_like(x))
    def good(layer: Mix, x: Tensor) -> Tensor:
        return x + layer.weight[0]

    layer, x = Mix(), torch.randn(2, 4)
    assert torch.equal(good(layer, x), x + layer.weight[0])


# -- unregistered layers ------------------------------------------------


def test_traced_call_of_an_unregistered_layer() -> None:
    stack, x = Stack().eval(), torch.randn(2, 4)
    run = torch.compile(stack, backend="glowplug", fullgraph=True, options={"compiler": "eager"})
    with torch.no_grad(), pytest.raises(Exception, match="test_layer_op::mix was traced for a layer that is not reg"):
        run(x)


def test_traced_call_of_an_unregistered_layer_outside_fullgraph() -> None:
    """Dynamo turns the raise into a graph break: no error, but nothing wrong either."""
    stack, x = Stack().eval(), torch.randn(2, 4)
    with torch.no_grad():
        try:
            output = torch.compile(stack, backend="glowplug", options={"compiler": "eager"})(x)
        except LayerLookupError as error:
            assert "register_layers" in str(error)
        else:
            assert torch.equal(output, eager(stack, x))


# -- the op as torch.library sees it ------------------------------------------------


@pytest.mark.parametrize("identity", ["hoisted", "baked"])
def test_opcheck(identity: str) -> None:
    stack, x = Stack(Split), torch.randn(2, 4)
    registry = glowplug.register_layers(stack, identity=identity)  # type: ignore[arg-type]
    first = registry.handles["layers.1"] if identity == "hoisted" else f"{registry.scope}:layers.1"
    op = getattr(torch.ops.test_layer_op.halves, identity)
    with torch.no_grad():
        low, high = op(first, x, 2.0)
        torch.testing.assert_close((low, high), halves(stack.layers[1], x, 2.0), rtol=0, atol=0)
        torch.library.opcheck(op, (first, x, 2.0), test_utils=("test_schema", "test_faketensor"))


def test_mutating_schema_is_declared() -> None:
    schema = str(torch.ops.test_layer_op.accumulate.hoisted._schema)
    assert "(a" in schema  # an alias annotation: torch knows that the argument is written to
    assert "(a" not in str(torch.ops.test_layer_op.mix.hoisted._schema)
