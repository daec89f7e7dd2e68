"""The ops that glowplug brings for experts: the block's own answer, with the shared experts' work done beside it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import families
from glowplug.bodies import BoundBody
from glowplug.bodies.body import Body
from glowplug.bodies.form import Argument, CallForm
from glowplug.layers import ForwardContext, forward_context, register_layers
from glowplug.ops import moe
from glowplug.ops.moe import moe_forward, moe_forward_shared, shared_experts_name

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def block_of(family: str) -> nn.Module:
    """The last mixture-of-experts block of a family."""
    model = families.build(family)
    return model.model.layers[-1].mlp


@pytest.fixture
def block() -> nn.Module:
    return block_of("glm4_moe").requires_grad_(False)


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (4, 33)], ids=str)
def test_a_whole_block(family: str, shape: tuple[int, int]) -> None:
    block, x = block_of(family), torch.randn(*shape, 64)
    with torch.no_grad():
        expected = type(block).forward(block, x)
        output = moe_forward_shared(block, x)
    assert torch.equal(output, expected)
    assert output.is_contiguous()
    # The shared experts are in it: without them the answer is another.
    with torch.no_grad():
        assert not torch.allclose(expected, expected - block.shared_experts(x))


def test_routed_experts_alone(block: nn.Module) -> None:
    x = torch.randn(5, 64)
    index, weights = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2]]), torch.rand(5, 2)
    with torch.no_grad():
        assert torch.equal(moe_forward(block.experts, x, index, weights), block.experts(x, index, weights))


def test_routed_tokens_of_llama4() -> None:
    experts = families.build("llama4").model.layers[1].feed_forward.experts
    x = torch.randn(4 * 6, 64)
    with torch.no_grad():
        assert torch.equal(moe_forward(experts, x, None, None), experts(x))


def test_a_compiled_body_is_used(block: nn.Module) -> None:
    x, index, weights = torch.randn(3, 64), torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
    seen: list[Tensor] = []

    def piece(*arguments: Tensor) -> tuple[Tensor]:
        seen.extend(arguments)
        return (torch.zeros(3, 64),)

    arguments = (
        Argument(("tokens", 64), x.dtype, "values"),
        Argument(("tokens", 2), index.dtype, "choices"),
        Argument(("tokens", 2), weights.dtype, "shares"),
    )
    form = CallForm("glowplug::moe_forward", arguments)
    body = BoundBody(block.experts, piece, Body(("tensors[0]", "tensors[1]", "tensors[2]")), form, limit=3 * 64)
    with forward_context(ForwardContext(register_layers(block), bodies={id(block.experts): body})):
        assert torch.equal(moe_forward(block.experts, x, index, weights), torch.zeros(3, 64))
    assert [a is b for a, b in zip(seen, (x, index, weights), strict=True)] == [True] * 3


def test_the_result_is_contiguous() -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor, *_: Tensor) -> Tensor:
            return x.t().contiguous().t()

    x = torch.randn(3, 4)
    output = moe_forward(Turned(), x, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
    assert output.is_contiguous()
    assert torch.equal(output, x)


@pytest.mark.parametrize("name", moe.SHARED_NAMES)
def test_names_of_shared_experts(name: str) -> None:
    block = nn.Module()
    assert shared_experts_name(block) is None
    block.add_module(name, None)
    assert shared_experts_name(block) is None
    block.add_module(name, nn.Linear(2, 2))
    assert shared_experts_name(block) == name


# -- the side stream, with fakes in the place of a GPU's ------------------------------------------------


class FakeStream:
    """Runs everything at once, and writes down what it was asked."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.log.append(f"{self.name} records")
        return "event"

    def wait_event(self, event: str) -> None:
        assert event == "event"
        self.log.append(f"{self.name} waits for the event")

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: Any) -> None: ...


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[str]:
    """Makes the CUDA path run on a CPU, and returns what happened on its streams."""
    happened: list[str] = []
    main = FakeStream(happened, "main")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: main)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: FakeStream(happened, "side"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: happened.append(f"kept for {stream.name}"))
    moe._side_stream.cache_clear()
    request.addfinalizer(moe._side_stream.cache_clear)
    return happened


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_side_stream_gives_the_blocks_output(family: str, log: list[str]) -> None:
    block, x = block_of(family).requires_grad_(False), torch.randn(2, 5, 64)
    assert torch.equal(moe._with_shared_on_side_stream(block, x), type(block).forward(block, x))
    waits = [line for line in log if "wait" in line or "record" in line]
    assert waits == ["side waits for main", "side records", "main waits for the event"]
    assert "kept for side" in log  # the input, read on the side stream
    assert "kept for main" in log  # the shared output, made on the side stream


def test_shared_experts_run_once(block: nn.Module, log: list[str]) -> None:
    runs: list[int] = []
    block.shared_experts.register_forward_pre_hook(lambda *_: runs.append(1))
    moe._with_shared_on_side_stream(block, torch.randn(2, 5, 64))
    assert runs == [1]


def test_the_block_is_left_as_it_was(block: nn.Module, log: list[str]) -> None:
    shared, children = block.shared_experts, dict(block._modules)
    moe._with_shared_on_side_stream(block, torch.randn(2, 5, 64))
    assert block._modules == children
    assert block.shared_experts is shared


def test_a_block_that_feeds_something_else(log: list[str]) -> None:
    """The shared experts get another tensor than the block did: what was made ready must not be used."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared_experts, self.routed = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.routed(x) + self.shared_experts(x / 2) + self.shared_experts(x.flip(0))

    block, x = Normed().requires_grad_(False), torch.randn(3, 4)
    assert torch.equal(moe._with_shared_on_side_stream(block, x), block(x))


def test_a_block_that_feeds_part_of_its_input(log: list[str]) -> None:
    """The same address is not the same tensor."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared_experts = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            first = self.shared_experts(x[:2])
            return x + torch.cat([first, first])

    class Turned(Part):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.shared_experts(x.t())

    class Written(Part):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.shared_experts(x)
            return x + y

    for cls in (Part, Turned, Written):
        block, x = cls().requires_grad_(False), torch.randn(4, 4)
        assert torch.equal(moe._with_shared_on_side_stream(block, x), block(x)), cls.__name__


def test_flattened_input_finds_the_output_ready(log: list[str]) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared_experts = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared_experts(x.view(-1, 4)).view(x.shape) + x

    block, x = Flat().requires_grad_(False), torch.randn(2, 3, 4)
    runs: list[int] = []
    block.shared_experts.register_forward_pre_hook(lambda *_: runs.append(1))
    output = moe._with_shared_on_side_stream(block, x)
    assert runs == [1]
    assert torch.equal(output, block(x))


def test_a_block_without_shared_experts(log: list[str]) -> None:
    block = block_of("mixtral")
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        assert torch.equal(moe._with_shared_on_side_stream(block, x), type(block).forward(block, x))
    assert log == []


def test_two_threads_in_one_block(block: nn.Module, log: list[str]) -> None:
    inputs = [torch.randn(2, 5, 64) for _ in range(8)]
    expected = [type(block).forward(block, x) for x in inputs]
    outputs: dict[int, Tensor] = {}

    def work(number: int) -> None:
        for _ in range(20):
            outputs[number] = moe._with_shared_on_side_stream(block, inputs[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(torch.equal(outputs[number], expected[number]) for number in range(8))


@CUDA
@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_on_a_gpu(family: str) -> None:
    block = block_of(family).requires_grad_(False).cuda()
    for tokens in (1, 7, 300):
        x = torch.randn(2, tokens, 64, device="cuda")
        torch.testing.assert_close(moe_forward_shared(block, x), type(block).forward(block, x))


# -- opaque experts in whole models ------------------------------------------------
