"""Values that one layer makes and all later layers read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from torch import fx

from glowplug.errors import NotStampableError
from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.split import Piece
from glowplug.graph.stamp import Local, Locations, Once, Own, Previous, Stamped, stamp
from glowplug.program.plan import Plan

PATH = ".weight"


class Template:
    """A template whose layers are one piece each: layer 1 reads `h0` and its weight `w1`, and makes `h1`.

    Args:
        layers: its number of layers.
        makes: layer -> a further value that it makes.
        takes: layer -> the values that it reads besides.
    """

    def __init__(
        self, layers: int, makes: Mapping[int, str], takes: Mapping[int, Sequence[str]], returns: Sequence[str] = ()
    ) -> None:
        self.steps = [Piece(None, ("x",), ("start",))]
        self.prints = [Fingerprint("head", ())]
        for layer in range(layers):
            before = f"h{layer - 1}" if layer else "start"
            inputs = (before, *takes.get(layer, ()), f"w{layer}")
            made = (makes[layer],) if layer in makes else ()
            self.steps.append(Piece(None, inputs, (f"h{layer}", *made), layer))
            self.prints.append(Fingerprint(f"{len(inputs)} to {1 + len(made)}", ()))
        self.outputs = tuple(returns) or (f"h{layers - 1}",)
        graph = fx.Graph()
        for name in ("x", "start", *(f"w{layer}" for layer in range(layers))):
            graph.placeholder(name)
        self.captured: Any = SimpleNamespace(gm=SimpleNamespace(graph=graph))
        self.locations = Locations({f"w{layer}": (layer, PATH) for layer in range(layers)}, frozenset({"x"}))
        self.layers = layers

    def stamp(self, kinds: Sequence[int]) -> Stamped:
        """Stamp it over layers of these kinds."""
        return stamp(
            self.captured,
            self.steps,
            self.prints,
            self.outputs,
            locations=self.locations,
            template=kinds[: self.layers],
            kinds=kinds,
        )

    def run(self, kinds: Sequence[int]) -> Any:
        """What the deep model returns, as nested tuples of what went into each piece."""
        plan = Plan(tuple(self.steps[:1]), tuple(self.prints[:1]), self.outputs, {"x": "x"}, self.stamp(kinds), ())
        values: dict[Any, Any] = {"x": "x"}
        for deep in plan.deep:
            read = [
                f"w{deep.layer + source.offset}" if isinstance(source, Own) else values[source]
                for source in deep.inputs.values()
            ]
            for at, output in enumerate(deep.outputs):
                values[output] = (at, *read)
        return tuple(values[source] for source in plan.returned)


def deep_model(depth: int, makers: Mapping[int, str], read_by: Any) -> Any:
    """What a model of this depth returns if its layers are run one by one."""
    hidden: Any = (0, "x")
    made: dict[str, Any] = {}
    for layer in range(depth):
        read = (hidden, *(made[name] for name in read_by(layer)), f"w{layer}")
        if layer in makers:
            made[makers[layer]] = (1, *read)
        hidden = (0, *read)
    return (hidden,)


@pytest.mark.parametrize("depth", [5, 6, 12])
def test_what_the_first_layer_makes_once_reaches_every_later_layer(depth: int) -> None:
    template = Template(5, {0: "once"}, {layer: ["once"] for layer in range(1, 5)})
    stamped = template.stamp([0] * depth)
    assert [unit.steps[0].wiring[1] for unit in stamped.units[1:]] == [Once(0, 0, 1)] * 4
    assert stamped.sequence.count(0) == 1
    assert template.run([0] * depth) == deep_model(depth, {0: "once"}, lambda layer: ["once"] if layer else [])


def test_a_layer_of_its_own_kind_may_make_it_later() -> None:
    kinds = [0, 1, *[2] * 10]
    template = Template(6, {1: "once"}, {layer: ["once"] for layer in range(2, 6)})
    assert template.run(kinds) == deep_model(12, {1: "once"}, lambda layer: ["once"] if layer > 1 else [])


def test_two_layers_may_make_one_each() -> None:
    kinds = [0, 1, *[2] * 10]
    takes = {1: ["first"], **{layer: ["first", "second"] for layer in range(2, 6)}}
    template = Template(6, {0: "first", 1: "second"}, takes)
    expected = deep_model(12, {0: "first", 1: "second"}, lambda layer: takes.get(min(layer, 5), []))
    assert template.run(kinds) == expected


def test_a_value_that_only_the_next_layer_reads_is_no_such_value() -> None:
    template = Template(5, {layer: f"extra{layer}" for layer in range(4)}, {n: [f"extra{n - 1}"] for n in range(1, 5)})
    stamped = template.stamp([0] * 9)
    assert all(unit.steps[0].wiring[1] == Previous(0, 1) for unit in stamped.units[1:])


@pytest.mark.parametrize("readers", [[1, 3, 4], [2, 3, 4], [1, 2, 3], [1, 4], [3]])
def test_a_value_that_some_later_layers_do_not_read_is_refused(readers: list[int]) -> None:
    """The template does not show which of the layers beyond it read the value."""
    template = Template(5, {0: "once"}, {layer: ["once"] for layer in readers})
    with pytest.raises(NotStampableError):
        template.stamp([0] * 12)


def test_a_layer_that_makes_such_a_value_runs_once() -> None:
    """Beyond the template there are more layers of the kind that made it."""
    kinds = [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1]
    template = Template(6, {1: "once"}, {layer: ["once"] for layer in range(2, 6)})
    try:
        found = template.run(kinds)
    except NotStampableError:
        return
    assert found == deep_model(12, {1: "once"}, lambda layer: ["once"] if layer > 1 else [])


def test_a_model_may_not_return_such_a_value() -> None:
    takes = {layer: ["once"] for layer in range(1, 5)}
    template = Template(5, {0: "once"}, takes, returns=("h4", "once"))
    with pytest.raises(NotStampableError, match="returns a value of a layer before its last"):
        template.stamp([0] * 12)


def test_layers_that_read_it_in_another_order_are_refused() -> None:
    """Two such values, which one layer of the template reads the other way round."""
    takes = {layer: ["first", "second"] for layer in range(2, 7)} | {1: ["first"], 4: ["second", "first"]}
    with pytest.raises(NotStampableError, match="look alike, but read different values"):
        Template(7, {0: "first", 1: "second"}, takes).stamp([0, 1, *[2] * 12])


def test_what_a_layer_reads_of_itself_is_its_own() -> None:
    template = Template(4, {}, {})
    stamped = template.stamp([0] * 7)
    assert all(unit.steps[0].wiring[-1] == Own(0, PATH) for unit in stamped.units)
    assert stamped.outputs == (Local(0, 0),)
