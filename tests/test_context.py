"""`ForwardContext`: nested, per thread and per task; the order of layers is checked, and nothing survives an error."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch import nn

import glowplug
from glowplug import ForwardContext, LayerOrderError, LayerRegistry, UsageError, current_context, forward_context

OP = "test_context::op"


def registry(*layers: nn.Module, check: bool = True) -> LayerRegistry:
    """Layers `0`, `1`, ... of `OP`, in order."""
    found = glowplug.register_layers(nn.ModuleList(layers), identity="ordered")
    _keep.append(layers)
    found.set_order(OP, [str(index) for index in range(len(layers))])
    return found


_keep: list[tuple[nn.Module, ...]] = []


def take(context: ForwardContext, kind: str) -> nn.Module:
    return context.next_layer(OP, kind)


@pytest.fixture
def alike() -> LayerRegistry:
    """Three layers of one kind."""
    return registry(*(nn.Linear(2, 2) for _ in range(3)))


@pytest.fixture
def mixed() -> LayerRegistry:
    """A layer of one kind between two of another."""
    return registry(nn.Linear(2, 2), nn.Linear(3, 3), nn.Linear(2, 2))


# -- which context is current ------------------------------------------------


def test_contexts_nest(alike: LayerRegistry) -> None:
    outer, inner = ForwardContext(alike), ForwardContext(alike)
    assert current_context() is None
    with forward_context(outer) as given:
        assert given is outer is current_context()
        with forward_context(inner):
            assert current_context() is inner
        assert current_context() is outer
    assert current_context() is None


def test_a_nested_context_counts_for_itself(alike: LayerRegistry) -> None:
    """A draft model that runs inside a step of its target must not use up the target's layers."""
    kind = alike.kind("0")
    with forward_context(ForwardContext(alike)) as outer:
        assert take(outer, kind) is alike["0"]
        with forward_context(ForwardContext(alike)) as inner:
            assert [take(inner, kind) for _ in range(3)] == [alike[str(i)] for i in range(3)]
        assert take(outer, kind) is alike["1"]
        assert take(outer, kind) is alike["2"]


def test_an_error_resets_and_is_not_covered_up(alike: LayerRegistry) -> None:
    """One layer of three ran: the reason is the model's own error, not the order."""
    outer = ForwardContext(alike)
    with pytest.raises(ZeroDivisionError), forward_context(outer):
        take(outer, alike.kind("0"))
        raise ZeroDivisionError
    assert current_context() is None
    again = ForwardContext(alike)
    with forward_context(again):
        assert [take(again, alike.kind("0")) for _ in range(3)] == [alike[str(i)] for i in range(3)]


def test_an_error_of_order_resets(alike: LayerRegistry) -> None:
    with pytest.raises(LayerOrderError), forward_context(ForwardContext(alike)) as context:
        take(context, alike.kind("0"))
    assert current_context() is None


def test_an_inner_error_of_order_leaves_the_outer_current(alike: LayerRegistry) -> None:
    outer = ForwardContext(alike)
    with forward_context(outer):
        with pytest.raises(LayerOrderError), forward_context(ForwardContext(alike)) as inner:
            take(inner, alike.kind("0"))
        assert current_context() is outer


def test_threads_do_not_see_each_other(alike: LayerRegistry) -> None:
    barrier, kind = threading.Barrier(4, timeout=20), alike.kind("0")

    def one_pass(_: int) -> list[nn.Module]:
        assert current_context() is None
        mine = ForwardContext(alike)
        with forward_context(mine):
            layers = []
            for _step in range(3):
                barrier.wait()
                assert current_context() is mine
                layers.append(take(mine, kind))
        return layers

    with forward_context(ForwardContext(alike)) as outer, ThreadPoolExecutor(4) as pool:
        results = list(pool.map(one_pass, range(4)))
        assert current_context() is outer
    assert results == [[alike[str(i)] for i in range(3)]] * 4


def test_tasks_do_not_see_each_other(alike: LayerRegistry) -> None:
    async def one_pass() -> bool:
        mine = ForwardContext(alike)
        with forward_context(mine):
            for _ in range(3):
                await asyncio.sleep(0)
                take(mine, alike.kind("0"))
                if current_context() is not mine:
                    return False
        return True

    async def both() -> list[bool]:
        return await asyncio.gather(one_pass(), one_pass(), one_pass())

    assert asyncio.run(both()) == [True] * 3


# -- the order ------------------------------------------------


def test_layers_come_in_order(mixed: LayerRegistry) -> None:
    with forward_context(ForwardContext(mixed)) as context:
        for name in ("0", "1", "2"):
            assert take(context, mixed.kind(name)) is mixed[name]


@pytest.mark.parametrize("ran", [1, 2])
def test_leftover_layers(alike: LayerRegistry, ran: int) -> None:
    with pytest.raises(LayerOrderError) as caught, forward_context(ForwardContext(alike)) as context:
        for _ in range(ran):
            take(context, alike.kind("0"))
    message = str(caught.value)
    assert f"{OP} ran {ran} times" in message
    assert "3 layers are registered" in message
    assert "(1, 2)" in message if ran == 1 else "(2)" in message
    assert 'identity="hoisted"' in message


def test_a_layer_that_ran_twice(alike: LayerRegistry) -> None:
    context = ForwardContext(alike)
    for _ in range(3):
        take(context, alike.kind("0"))
    with pytest.raises(LayerOrderError, match=r"called 4 times.*ran twice"):
        take(context, alike.kind("0"))


def test_wrong_kind_is_noticed_at_the_call(mixed: LayerRegistry) -> None:
    context = ForwardContext(mixed)
    take(context, mixed.kind("0"))
    with pytest.raises(LayerOrderError, match="next in order is '1'"):  # layer 1 was left out
        take(context, mixed.kind("2"))


def test_an_op_that_never_ran_is_no_error(alike: LayerRegistry) -> None:
    """A model may have layers of an op which this pass has no use for, such as vision layers."""
    alike.set_order("test_context::other", ["0"])
    with forward_context(ForwardContext(alike)) as context:
        for _ in range(3):
            take(context, alike.kind("0"))


def test_ops_count_apart(alike: LayerRegistry) -> None:
    alike.set_order("test_context::other", ["2", "0"])
    kind = alike.kind("0")
    with forward_context(ForwardContext(alike)) as context:
        order = [context.next_layer(op, kind) for op in (OP, "test_context::other") * 2]
        take(context, kind)
    assert order == [alike["0"], alike["2"], alike["1"], alike["0"]]


def test_unknown_order(alike: LayerRegistry) -> None:
    with pytest.raises(UsageError, match="test_context::unheard"):
        ForwardContext(alike).next_layer("test_context::unheard", "")


def test_without_the_check_wrong_layers_come_silently(mixed: LayerRegistry) -> None:
    """What the check prevents: this is how a wrong order reads as garbage."""
    with forward_context(ForwardContext(mixed, check_order=False)) as context:
        take(context, mixed.kind("0"))
        assert take(context, mixed.kind("2")) is mixed["1"]


def test_a_counter_lives_for_one_pass(alike: LayerRegistry) -> None:
    for _ in range(2):
        with forward_context(ForwardContext(alike)) as context:
            for index in range(3):
                assert take(context, alike.kind("0")) is alike[str(index)]
