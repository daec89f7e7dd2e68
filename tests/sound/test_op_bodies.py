"""Compiled op bodies: never stale, whatever of what they read changes; no reason to fail; never new in mid-sequence."""

from __future__ import annotations

import copy
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

import families
import glowplug
from storing import StoringGraphs

BOOST = 1.0
TABLE = {"boost": 1.0}


class Settings:
    boost = 1.0


SETTINGS = Settings()


def helper(scores: Tensor) -> Tensor:
    return scores * BOOST


def slow_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """Attention that reads whatever a function can read, and that is always slower than its compiled body."""
    if not torch.compiler.is_compiling():
        time.sleep(0.003)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (module.scaling * getattr(module, "boost", 1.0))
    scores = helper(scores) * TABLE["boost"] * SETTINGS.boost * module.config.rms_norm_eps ** getattr(module, "p", 0)
    scores = scores if mask is None else scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


class Uncompiled:
    """A piece compiler that runs pieces as they are; op bodies are made all the same.

    Args:
        run: what becomes of an op body's graph.
    """

    name = "uncompiled"

    def __init__(self, run: Callable[[fx.GraphModule], Callable[..., Any]] = lambda piece: piece.forward) -> None:
        self.run = run
        self.bodies = 0

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        names = {getattr(node.target, "__name__", str(node.target)) for node in piece.graph.nodes}
        if "matmul" not in names:
            return piece.forward
        self.bodies += 1
        return self.run(piece)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., PreTrainedModel]]:
    def make(layers: int = 6) -> PreTrainedModel:
        model = families.build("qwen3_moe", layers=layers)
        module = sys.modules[type(model).__module__]
        monkeypatch.setattr(module, "eager_attention_forward", slow_attention)
        model.set_attn_implementation("eager")
        return model

    yield make


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def attention(model: PreTrainedModel) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def new_attribute(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in attention(model):
        layer.boost = 0.1


def attribute_of_one_layer(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    attention(model)[4].boost = 0.1


def attribute_of_the_config(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in attention(model):
        layer.p = 0.02


def global_number(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "BOOST", 0.1)


def global_dict(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "boost", 0.1)


def global_object(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(SETTINGS), "boost", 0.1)  # which leaves nothing behind


def global_class(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "boost", 0.1)


def global_function(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "helper", lambda scores: scores * 0.1)


CHANGES = [
    new_attribute,
    attribute_of_one_layer,
    attribute_of_the_config,
    global_number,
    global_dict,
    global_object,
    global_class,
    global_function,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_what_a_body_reads(change: Any, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = families.prompt(2, 5)
    eager, model = build(), build()
    compiler = Uncompiled()
    glowplug.compile(model, compiler=compiler, inside="compiled", experts="inline")
    logits(model, ids)
    before = logits(model, ids)
    assert compiler.bodies > 0
    assert glowplug.report(model).insides[0].tokens != 0
    torch.testing.assert_close(before, logits(eager, ids), rtol=1e-5, atol=1e-5)
    for one in (model, eager):
        change(one, monkeypatch)
    expected = logits(eager, ids)
    assert not torch.allclose(expected, before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)
    assert any("changed" in fallback.reason for fallback in glowplug.report(model).fallbacks)


def test_a_change_in_the_middle_of_a_sequence(build: Any) -> None:
    """Within `generate`: the next step sees it, as eager's does."""
    ids = families.prompt(1, 5)

    def steps(model: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            output = model(ids, use_cache=True)
            for layer in attention(model):
                layer.boost = 0.05
            return model(ids[:, :2], past_key_values=output.past_key_values).logits

    eager, model = build(), build()
    glowplug.compile(model, compiler=Uncompiled(), inside="compiled", experts="inline")
    logits(model, ids)
    torch.testing.assert_close(steps(model), steps(eager), rtol=1e-5, atol=1e-5)


def test_a_body_whose_trial_raises_is_no_users_problem(build: Any) -> None:
    def fails(piece: fx.GraphModule) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            raise RuntimeError("a kernel that this machine lacks")

        return run

    ids = families.prompt(2, 5)
    eager, model = build(), build()
    glowplug.compile(model, compiler=Uncompiled(fails), inside="compiled", experts="inline")
    for _ in range(2):
        torch.testing.assert_close(logits(model, ids), logits(eager, ids), rtol=1e-5, atol=1e-5)
    assert all(inside.tokens == 0 for inside in glowplug.report(model).insides)


@pytest.mark.parametrize("place", ["experts", "block", "attention"])
def test_hooks_that_were_there_before_run_once(place: str, build: Any) -> None:
    """A hook on what runs behind an op: it runs, and once, with a compiled body or without."""
    ids = families.prompt(2, 5)
    eager, model = families.build("qwen3_moe"), families.build("qwen3_moe")
    for one in (eager, model):
        for layer in one.model.layers:
            at = {"experts": getattr(layer.mlp, "experts", layer.mlp), "block": layer.mlp, "attention": layer.self_attn}
            at[place].register_forward_hook(
                lambda module, args, output: (
                    (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5
                )
            )
    glowplug.compile(model, compiler=Uncompiled(), inside="compiled", experts="opaque")
    for _ in range(2):
        torch.testing.assert_close(logits(model, ids), logits(eager, ids), rtol=1e-5, atol=1e-5)
    assert glowplug.report(model).serving == "program"


# -- pieces and bodies that arrive later --


class Marking(StoringGraphs):
    """What a fork compiled gives a little more than the uncompiled piece: within the tolerance, told by bits.

    Args:
        go: forks deliver nothing until this file is there.
    """

    name = "marking"

    def __init__(self, go: Path) -> None:
        super().__init__()
        self.go = go

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        while os.getpid() != self.home and not self.go.exists():
            time.sleep(0.01)
        return super().compile(piece, inputs)

    def load(self, artifact: bytes) -> Callable[..., Sequence[Any]]:
        run = super().load(artifact)
        return lambda *args: tuple(value * (1 + 2e-6) for value in run(*args))


def steps(model: PreTrainedModel, ids: Tensor, between: Callable[[], Any] = lambda: None) -> list[Tensor]:
    """The logits of a prefill and three steps; something happens behind the first of them."""
    found = []
    with torch.no_grad():
        output = model(ids, use_cache=True)
        for number in range(3):
            found.append(output.logits)
            output = model(ids[:, :1], past_key_values=output.past_key_values)
            if number == 0:
                between()
    return [*found, output.logits]


def other_sequence(model: PreTrainedModel) -> None:
    """Another thread begins a sequence, once all is there that was compiled beside serving."""

    def run() -> None:
        glowplug.settle(model)
        logits(model, families.prompt(1, 4))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


@pytest.mark.parametrize("experts", ["inline", "opaque"])
def test_what_arrives_changes_no_sequence_under_way(experts: str, tmp_path: Path) -> None:
    ids = families.prompt(1, 6)
    model, twin = (families.build("glm4_moe", layers=24) for _ in range(2))
    glowplug.compile(twin, compiler="eager", experts=experts)
    glowplug.compile(model, compiler=Marking(tmp_path / "go"), experts=experts)
    for one in (model, twin):
        logits(one, ids)
    assert glowplug.report(model).pending_pieces > 0

    def arrive() -> None:
        (tmp_path / "go").touch()
        other_sequence(model)

    expected = steps(twin, ids)
    found = steps(model, ids, between=arrive)
    assert glowplug.report(model).pending_pieces == 0
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    later = steps(model, ids)
    assert not any(torch.equal(one, other) for one, other in zip(later, expected, strict=True))  # now they are used
    for one, other in zip(later, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


class Blocking(StoringGraphs):
    """Compiles in this process alone when told to, and waits with it."""

    name = "blocking"

    def __init__(self) -> None:
        super().__init__()
        self.blocked, self.begun, self.go = False, threading.Event(), threading.Event()

    def forks(self, inputs: Sequence[Sequence[Any]], *, several: bool = False) -> bool:
        return not self.blocked

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        if self.blocked:
            self.begun.set()
            self.go.wait(120)
        return super().compile(piece, inputs)


def test_serving_goes_on_while_another_thread_compiles() -> None:
    """Calls of another signature are compiled in a thread; new sequences of the old one do not wait for that."""
    compiler = Blocking()
    ids = families.prompt(1, 6)
    model = families.build("glm4_moe", layers=24)
    glowplug.compile(model, compiler=compiler, experts="inline")
    logits(model, ids)
    assert glowplug.report(model).pending_pieces > 0
    compiler.blocked = True

    def by_embeddings() -> None:
        with torch.no_grad():
            model(inputs_embeds=model.get_input_embeddings()(ids).to(torch.float32))

    building = threading.Thread(target=by_embeddings, daemon=True)
    building.start()
    assert compiler.begun.wait(60)
    answered = threading.Event()

    def serve() -> None:
        logits(model, ids)
        answered.set()

    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    served = answered.wait(30)
    compiler.go.set()
    building.join()
    serving.join()
    assert served


@pytest.mark.inductor
def test_a_limit_of_experts_changes_after_the_bodies_were_compiled() -> None:
    """gpt-oss, as a user has it: default options, two short texts, then another limit in every layer."""
    eager, model = families.build("gpt_oss", layers=12), families.build("gpt_oss", layers=12)
    ids = families.prompt(1, 5)
    glowplug.compile(model)
    for _ in range(2):
        model.generate(ids, max_new_tokens=3, do_sample=False)
        glowplug.settle(model)
    before = logits(model, ids)
    torch.testing.assert_close(before, logits(eager, ids), rtol=1e-3, atol=1e-3)
    for one in (eager, model):
        for layer in one.model.layers:
            layer.mlp.experts.limit = 0.1
    expected = logits(eager, ids)
    assert not torch.allclose(expected, before, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-3, atol=1e-3)
    for layer in model.model.layers:
        layer.mlp.experts.limit = copy.copy(7.0)
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-5, atol=1e-5)
    assert isinstance(model, nn.Module) and glowplug.report(model).serving == "program"
