"""Capture: one graph, every input's source known, nothing run, and a clear reason where it can't be done."""

from __future__ import annotations

import threading
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glowplug
from glowplug.errors import CaptureError
from glowplug.graph.capture import Captured, capture, is_fake
from glowplug.graph.sources import parse
from glowplug.layers.watch import ReadWatch


class Peek(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.register_buffer("offset", torch.randn(4))
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        return peek(self, x * self.weight + self.offset)


@glowplug.layer_op("test_capture::peek", fake=lambda x: torch.empty_like(x))
def peek(layer: Peek, x: Tensor) -> Tensor:
    """An op that tells when it really ran."""
    layer.seen += 1
    return x + 1


def call_net(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)


def marked(*shape: int) -> Tensor:
    x = torch.randn(shape)
    torch._dynamo.mark_dynamic(x, 0)
    return x


@pytest.fixture
def net() -> Peek:
    made = Peek().eval()
    made.__dict__["registry"] = glowplug.register_layers(made, layers={"": made})
    return made


def test_inputs_and_sources(net: Peek) -> None:
    x = marked(3, 4)
    found = capture(call_net, [net, x], lambda captured: captured.inputs)
    by_source = {entry.source: entry for entry in found}
    assert by_source["L['x']"].type == "tensor"
    assert by_source["L['net']._parameters['weight']"].value is net.weight
    assert by_source["L['net']._buffers['offset']"].value is net.offset
    assert [entry.value for entry in found if entry.type == "handle"] == [net._glowplug_handle]
    assert {entry.type for entry in found} <= {"tensor", "symint", "handle"}


def test_nothing_runs(net: Peek) -> None:
    weight = net.weight.detach().clone()
    x = marked(3, 4)
    before = x.clone()
    capture(call_net, [net, x], lambda captured: None)
    assert net.seen == 0
    assert torch.equal(x, before)
    assert torch.equal(net.weight, weight)


def test_captured_writes_do_not_happen() -> None:
    def writes(x: Tensor) -> Tensor:
        x.mul_(2)
        return x + 1

    x = marked(3, 4)
    before = x.clone()
    capture(writes, [x], lambda captured: None)
    assert torch.equal(x, before)


def test_values_are_fake_and_sizes_symbolic(net: Peek) -> None:
    def look(captured: Captured) -> list[tuple[bool, bool]]:
        values = [node.meta.get("example_value") for node in captured.gm.graph.nodes if node.op == "call_function"]
        tensors = [value for value in values if isinstance(value, Tensor)]
        return [(is_fake(t), isinstance(t.shape[0], torch.SymInt)) for t in tensors]

    found = capture(call_net, [net, marked(3, 4)], look)
    assert found
    assert set(found) == {(True, True)}


def test_returns_what_consume_returns() -> None:
    assert capture(lambda x: x + 1, [marked(3)], lambda captured: "mine") == "mine"


def test_consumes_own_error_comes_out() -> None:
    def fail(captured: Captured) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        capture(lambda x: x + 1, [marked(3)], fail)


def test_a_model_that_swallows_exceptions_does_not_swallow_the_stop(net: Peek) -> None:
    def swallows(net: nn.Module, x: Tensor) -> Tensor:
        try:
            return net(x)
        except Exception:
            return x

    assert capture(swallows, [net, marked(3, 4)], lambda captured: len(captured.inputs)) >= 4
    assert net.seen == 0


def graph_break(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x + 1


def data_dependent(x: Tensor) -> Tensor:
    return x + 1 if x.sum() > 0 else x - 1


def opens_a_file(x: Tensor) -> Tensor:
    open("/dev/null").close()
    return x * 2


@pytest.mark.parametrize("fn", [graph_break, data_dependent, opens_a_file], ids=lambda fn: fn.__name__)
def test_what_cannot_be_traced_whole_is_refused(fn: types.FunctionType) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(fn, [marked(3)], lambda captured: None)
    assert len(str(caught.value)) > 20  # Dynamo's reason


def test_no_computation_is_refused() -> None:
    with pytest.raises(CaptureError, match="no tensor computation"):
        capture(lambda x: 1, [marked(3)], lambda captured: None)


def test_inputs_of_other_types_are_refused() -> None:
    """What is neither a tensor, a size nor a handle can't be bound: its value is a constant, or the capture fails."""

    class Config:
        scale = 3.0

    def reads(x: Tensor, config: Config) -> Tensor:
        return x * config.scale

    types = capture(reads, [marked(3), Config()], lambda captured: {entry.type for entry in captured.inputs})
    assert types <= {"tensor", "symint"}


def test_each_capture_is_fresh(net: Peek) -> None:
    """Without guards, a cached capture would answer for another model."""
    other = Peek().eval()
    registry = glowplug.register_layers(other, layers={"": other})

    def weight(captured: Captured) -> Tensor:
        return next(entry.value for entry in captured.inputs if "weight" in entry.source)

    assert capture(call_net, [net, marked(3, 4)], weight) is net.weight
    assert capture(call_net, [other, marked(3, 4)], weight) is other.weight
    assert capture(call_net, [net, marked(5, 4)], weight) is net.weight
    assert len(registry) == 1


def test_modes_of_the_caller_are_left_as_they_were(net: Peek) -> None:
    with torch.inference_mode():
        capture(call_net, [net, marked(3, 4)], lambda captured: None)
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    capture(call_net, [net, marked(3, 4)], lambda captured: None)
    assert torch.is_grad_enabled()
    with pytest.raises(CaptureError):
        capture(graph_break, [marked(3)], lambda captured: None)
    assert torch.is_grad_enabled()


def test_two_threads_capture_at_once() -> None:
    results: dict[int, str] = {}

    def work(number: int) -> None:
        model = nn.Linear(4, number + 2).eval()

        def consume(captured: Captured) -> str:
            shapes = [tuple(e.value.shape) for e in captured.inputs if "weight" in e.source]
            return str(shapes)

        results[number] = capture(call_net, [model, marked(3, 4)], consume)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results == {number: f"[({number + 2}, 4)]" for number in range(3)}


def test_counters_of_dynamo_recompile_limits_are_not_used_up() -> None:
    """A capture must work as often as it is asked for: Dynamo's limit of recompilations is 8."""
    for number in range(12):
        assert capture(call_net, [nn.Linear(4, 2 + number), marked(3, 4)], lambda captured: True)


class Refusing:
    def __len__(self) -> int:
        raise CaptureError("it can't be counted")


def test_what_a_model_raises_in_a_trace_is_the_reason() -> None:
    def unpacks(x: Tensor) -> Tensor:
        one, other = (x,)
        return one + other

    def counts(x: Tensor, what: Any) -> Tensor:
        return x * len(what)

    known = r"^traced, the model raised ValueError: .not enough values"
    older = r"^test_capture.py:\d+ unpacks something of another length"  # torch 2.11 does not get as far
    with pytest.raises(CaptureError, match=f"{known}|{older}"):
        capture(unpacks, (torch.ones(2),), lambda captured: None)
    with pytest.raises(CaptureError, match="it can't be counted"):  # torch 2.11 wraps the text
        capture(counts, (torch.ones(2), Refusing()), lambda captured: None)


class _Config:
    """As transformers' configurations, it looks attributes up in a way of its own."""

    boost = 2.0

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(name)


class _Configured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config, self.table = _Config(), {"a": 1.0, "b": 2.0}

    def forward(self, x: Tensor) -> Tensor:
        for value in self.table.values():
            x = x * value
        return x * self.config.boost


def test_what_lies_in_an_object_with_a_lookup_of_its_own_is_named_plainly() -> None:
    """Torch 2.11 names it by a call; whatever reads the names must see the attribute."""
    assert parse("object.__getattribute__(L['m'].config, 'x')['y']") == parse("L['m'].config.x['y']") is not None
    assert parse("type(dict.__getitem__(L['m'].table, 'a'))") == parse("type(L['m'].table['a'])") is not None
    reads: set[str] = set()

    def run(model: nn.Module, x: Tensor) -> Tensor:
        return type(model).forward(model, x)

    model = _Configured()
    model.config.boost = 3.0
    capture(run, (model, torch.ones(3)), lambda captured: None, reads)
    assert parse("L['model'].config.boost") in map(parse, reads)
    watch = ReadWatch({"": model}, model, reads)
    model.config.boost = 4.0
    assert watch.change() is not None
