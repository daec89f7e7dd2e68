"""Attention of one token: the same tokens as eager, only where it is meant to run, and never where it computes
something else. As on a GPU, on a CPU."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import StaticLayer

import families
import glowplug
from glowplug.frontends.hf import front
from glowplug.frontends.hf.discover import attention_layers
from glowplug.frontends.hf.steps import attention, decode
from glowplug.layers import ForwardContext, LayerRegistry, forward_context
from glowplug.ops.attention import ATTENTION_FN_ATTR
from glowplug.ops.grouped_attention import sink_attention
from storing import StoringGraphs

FAMILIES = ["gpt_oss", "qwen3_moe", "glm4_moe"]


class Calls:
    """Counts the calls of `step_attention` that ran, and those that were left to the layers."""

    def __init__(self) -> None:
        self.ran: Counter[int] = Counter()
        self.left: Counter[int] = Counter()

    def __call__(self, layer: nn.Module, query: Tensor, *args: Any) -> Tensor | None:
        output = attention.step_attention(layer, query, *args)
        (self.left if output is None else self.ran)[query.shape[2]] += 1
        return output


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """As on a GPU."""
    counting = Calls()
    monkeypatch.setattr(front, "_FAST_STEPS", ("cpu",))
    monkeypatch.setattr(front, "step_attention", counting)
    return counting


def build(family: str = "gpt_oss", **options: Any) -> PreTrainedModel:
    model = families.build(family)
    for layer in attention_layers(model).values():
        if hasattr(layer, "sinks"):
            torch.nn.init.normal_(layer.sinks)
    return glowplug.compile(model, compiler="eager", experts="inline", **options) if options else model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_tokens_equal_eager(calls: Calls, family: str, cache: str | None, padded: bool) -> None:
    torch.manual_seed(0)
    eager = build(family)
    torch.manual_seed(0)
    model = build(family, strict=True)
    ids = families.prompt(3, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[1, :4] = int(not padded)
    settings = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "attention_mask": mask}
    assert torch.equal(*(m.generate(ids, **settings) for m in (eager, model)))
    assert calls.ran == {1: 11 * len(attention_layers(model))}
    assert set(calls.left) == {6}
    assert glowplug.report(model).fallbacks == []


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 37), (3, 1, 20), (2, 7, 7), (2, 5, 30)])
def test_sinks_equal_the_models_own(sizes: tuple[int, int, int]) -> None:
    batch, tokens, cached = sizes
    layer = next(iter(attention_layers(build()).values()))
    heads, kv_heads = layer.config.num_attention_heads, layer.config.num_key_value_heads
    assert heads > kv_heads
    query = torch.randn(batch, heads, tokens, layer.head_dim)
    key, value = (torch.randn(batch, kv_heads, cached, layer.head_dim) for _ in range(2))
    mask = torch.zeros(batch, 1, tokens, cached)
    mask.masked_fill_(torch.ones(tokens, cached).triu(cached - tokens + 1).bool(), torch.finfo(torch.float32).min)
    mask[0, :, :, 0] = torch.finfo(torch.float32).min  # padding; the first token then sees nothing but the sink
    own = layer.forward.__globals__["eager_attention_forward"]
    expected = own(layer, query, key, value, mask, scaling=0.3)[0]
    output = sink_attention(query, key, value, mask, layer.sinks, 0.3)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    assert output.is_contiguous()


@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"dropout": 0.5}, {"position_bias": None}, {"scaling": None}])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_it_does_not_know_is_left_to_the_layers(calls: Calls, family: str, options: dict[str, Any]) -> None:
    model = build(family, strict=True)
    model.generate(families.prompt(1, 3), max_new_tokens=2, do_sample=False)
    layer = next(iter(attention_layers(model).values()))
    config = layer.config
    tensors = [torch.randn(1, config.num_key_value_heads, 5, layer.head_dim) for _ in range(2)]
    query = torch.randn(1, config.num_attention_heads, 1, layer.head_dim)
    mask = torch.zeros(1, 1, 1, 5)
    known = {"scaling": 0.25, "dropout": 0.0}
    assert attention.step_attention(layer, query, *tensors, mask, known) is not None
    assert attention.step_attention(layer, query, *tensors, mask, known | options) is None
    assert attention.step_attention(layer, query, *tensors, mask[..., :-1], known) is None
    assert attention.step_attention(layer, query.double(), *tensors, mask, known) is None
    assert attention.step_attention(layer, query.expand(-1, -1, 2, -1), *tensors, mask, known) is None
    if family == "gpt_oss":
        assert attention.step_attention(layer, query, *tensors, None, known) is None
    object.__setattr__(layer, ATTENTION_FN_ATTR, lambda *args, **kwargs: None)
    taken = attention.step_attention(layer, query, *tensors, mask, known)
    assert (taken is not None) == (family == "gpt_oss")  # a start compares functions with sinks


@pytest.mark.parametrize("options", [{"inside": "eager"}, {"verify": "off"}, {"inside": "auto"}])
def test_only_if_op_bodies_are_wanted_and_compared(calls: Calls, options: dict[str, Any]) -> None:
    model = build("qwen3_moe", **options)
    model.generate(families.prompt(1, 3), max_new_tokens=4, do_sample=False)
    assert bool(calls.ran) == (options == {"inside": "auto"})


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss attends by a function that computes something else with its sinks."""
    scope = type(next(iter(attention_layers(build()).values()))).forward.__globals__
    own = scope["eager_attention_forward"]

    def function(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output, weights = own(module, *args, **kwargs)
        return 2 * output, weights

    monkeypatch.setitem(scope, "eager_attention_forward", function)


def test_functions_that_compute_something_else_run(
    calls: Calls, twice: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the process that compared them, and in those that find its program."""
    torch.manual_seed(0)
    eager = build()
    ids = families.prompt(2, 5)
    expected = eager.generate(ids, max_new_tokens=8, do_sample=False)
    for start in ("cold", "warm"):
        torch.manual_seed(0)
        model = glowplug.compile(build(), compiler=StoringGraphs(), experts="inline", cache_dir=tmp_path)
        with caplog.at_level(logging.WARNING, logger="glowplug"):
            assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)
        assert (glowplug.report(model).serving, glowplug.report(model).start) == ("program", start)
        assert ("runs the layers' own functions" in caplog.text) == (start == "cold")
        assert not calls.ran
        caplog.clear()


def test_replaced_sinks_are_seen(calls: Calls) -> None:
    torch.manual_seed(0)
    eager = build()
    torch.manual_seed(0)
    model = build(strict=True)
    ids = families.prompt(2, 5)
    model.generate(ids, max_new_tokens=3, do_sample=False)
    for one in (eager, model):
        for layer in attention_layers(one).values():
            layer.sinks.data = torch.full_like(layer.sinks, 2.0)
    assert torch.equal(*(m.generate(ids, max_new_tokens=9, do_sample=False) for m in (eager, model)))
    assert calls.ran


def test_a_mask_is_made_additive_once_in_a_pass() -> None:
    mask, lowest = torch.tensor([[[[True, False, True]]]]), -torch.inf
    with forward_context(ForwardContext(LayerRegistry({}))):
        first, again = (attention._additive(mask, torch.float32, lowest) for _ in range(2))
        assert first is again
        assert attention._additive(mask.clone(), torch.float32, lowest) is not first
    assert first.tolist() == [[[[0.0, -torch.inf, 0.0]]]]
    with forward_context(ForwardContext(LayerRegistry({}))):
        assert attention._additive(mask, torch.float32, lowest) is not first
    smallest = torch.finfo(torch.float32).min
    assert attention._additive(first, torch.float32, smallest).tolist() == [[[[0.0, smallest, 0.0]]]]
    assert attention._additive(mask, torch.bfloat16, lowest).stride()[:-1] == (8, 8, 8)


# -- the static cache ---------------------------------------------------------------------------------------------


def test_append_does_what_this_transformers_does() -> None:
    assert decode.append_is_right()


@pytest.mark.parametrize("wrong", ["position", "count", "attribute"])
def test_another_update_of_transformers_is_noticed(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    own = StaticLayer.update

    def update(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = own(self, keys, values, *args, **kwargs)
        if wrong == "position":
            self.keys.copy_(self.keys.roll(1, dims=2))
        elif wrong == "count":
            self.cumulative_length.add_(1)
        else:
            self.updates = getattr(self, "updates", 0) + 1
        return result

    monkeypatch.setattr(StaticLayer, "update", update)
    assert not decode.append_is_right.__wrapped__()
