"""The compiled inside of attention that is several kernels: right in every form of call, and left alone otherwise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import families
import glowplug
from glowplug.hf import trials
from glowplug.hf.attention_kinds import attention_kinds, observed
from glowplug.hf.interfaces import attention_layers
from glowplug.layers import ForwardContext, forward_context
from glowplug.ops.attention import ATTENTION_FN_ATTR, attention
from glowplug.ops.inside import AttentionInside
from test_insides import Uncompiled

FAMILIES = ["gpt_oss", "qwen3_moe", "glm4_moe"]


@pytest.fixture(autouse=True)
def always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_FASTER", 1e9)


def build(family: str = "gpt_oss") -> PreTrainedModel:
    """A model that runs its own attention function, by need (gpt-oss) or by choice."""
    model = families.build(family)
    model.set_attn_implementation("eager")
    return model


def compiled(family: str = "gpt_oss", **options: Any) -> PreTrainedModel:
    return glowplug.compile(build(family), compiler=Uncompiled(), inside="compiled", experts="opaque", **options)


def insides(model: nn.Module) -> dict[str, AttentionInside]:
    in_use = model.forward.builder.in_use.every
    return {name: in_use[id(module)] for name, module in attention_layers(model).items()}


def counted(model: nn.Module) -> list[str]:
    """Gets a layer's name each time that its inside runs."""
    calls: list[str] = []
    for name, inside in insides(model).items():

        def run(*args: Any, name: str = name, own: Any = inside.run) -> Tensor:
            calls.append(name)
            return own(*args)

        inside.run = run
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_eager_and_used(family: str) -> None:
    eager, model = build(family), compiled(family)
    ids = families.prompt(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        model(ids)
        calls = counted(model)
        for arguments in ({}, {"attention_mask": mask}):
            torch.testing.assert_close(
                model(ids, **arguments).logits, eager(ids, **arguments).logits, rtol=1e-5, atol=1e-5
            )
        assert calls == 2 * list(attention_layers(model))
    for prompt in (families.prompt(1, 3), ids):
        expected, output = (m.generate(prompt, max_new_tokens=12, do_sample=False) for m in (eager, model))
        assert torch.equal(output, expected)
    assert len(calls) == (2 + 2 * 12) * len(attention_layers(model))
    report = glowplug.report(model)
    assert report.fallbacks == []
    assert sum(len(i.layers) for i in report.insides if i.op == "glowplug::attention") == len(attention_layers(model))


def test_beyond_a_sliding_window() -> None:
    eager, model = build(), compiled()
    ids = families.prompt(2, 40)
    assert model.config.sliding_window < 40
    with torch.no_grad():
        model(ids)
        calls = counted(model)
        torch.testing.assert_close(model(ids).logits, eager(ids).logits, rtol=1e-5, atol=1e-5)
    assert calls


def test_one_kernel_is_left_alone() -> None:
    model = families.build("qwen3_moe")  # sdpa
    glowplug.compile(model, compiler=Uncompiled(), inside="compiled", experts="opaque")
    with torch.no_grad():
        model(families.prompt(2, 5))
    assert not any(id(layer) in model.forward.builder.in_use.every for layer in attention_layers(model).values())
    assert model.forward.builder.prover.forms == {}


def test_nothing_is_observed_without_a_comparison_and_nothing_once_it_is_over() -> None:
    model = compiled(verify="off")
    with torch.no_grad():
        model(families.prompt(2, 5))
    assert model.forward.builder.prover.forms == {}
    again = compiled()
    with torch.no_grad():
        again(families.prompt(2, 5))
    functions = {layer.__dict__[ATTENTION_FN_ATTR].__name__ for layer in attention_layers(again).values()}
    assert functions == {"eager_attention_forward"}


def forms_of_calls() -> dict[str, Any]:
    """Calls of one attention layer that its inside was not made for."""
    return {
        "no mask": lambda q, k, v, m: (q, k, v, None),
        "another dtype": lambda q, k, v, m: (q.double(), k.double(), v.double(), m.double()),
        "mask for all sequences": lambda q, k, v, m: (q, k, v, m[:1]),
        "strided keys": lambda q, k, v, m: (q, k.transpose(1, 2).contiguous().transpose(1, 2), v, m),
        "strided query": lambda q, k, v, m: (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, m),
        "strided mask": lambda q, k, v, m: (q, k, v, m.transpose(2, 3).contiguous().transpose(2, 3)),
    }


@pytest.mark.parametrize("name", forms_of_calls())
def test_other_calls_run_the_layers_own_function(name: str) -> None:
    model = compiled()
    with torch.no_grad():
        model(families.prompt(2, 5))
    context = ForwardContext(model.forward.registry, insides=model.forward.builder.in_use.every)
    with torch.no_grad(), forward_context(context):
        path, inside = next(iter(insides(model).items()))
        layer = model.get_submodule(path)
        generator = torch.Generator().manual_seed(0)
        query, key, value, mask, *further = inside.form.make(2, 5, 9, torch.device("cpu"), generator)
        calls = counted(model)
        usual = attention(layer, query, key, value, mask, further, inside.form.options)
        assert calls == [path]
        if name == "another dtype":
            layer.double()
        arguments = forms_of_calls()[name](query, key, value, mask)
        output = attention(layer, *arguments, further, inside.form.options)
        own = layer.__dict__[ATTENTION_FN_ATTR](layer, *arguments, scaling=layer.scaling)[0]
        torch.testing.assert_close(output, own)
        assert output.shape == usual.shape
        other = inside.form.options.replace("scaling=", "scaling=1")
        attention(layer, query, key, value, mask, further, other)
    assert calls == [path]


def test_a_copy_has_none_of_its_own() -> None:
    model = compiled()
    ids = families.prompt(2, 5)
    with torch.no_grad():
        model(ids)
        twin = copy.deepcopy(model)
        for layer in attention_layers(twin).values():
            layer.sinks.mul_(3)
        assert not torch.allclose(twin(ids).logits, model(ids).logits)
        torch.testing.assert_close(twin(ids).logits, type(twin).forward(twin, ids).logits, rtol=1e-5, atol=1e-5)


def test_sinks_of_its_own_layer_whatever_becomes_of_them() -> None:
    eager, model = build(), compiled()
    ids = families.prompt(2, 5)
    with torch.no_grad():
        model(ids)
        for number, (one, other) in enumerate(
            zip(attention_layers(model).values(), attention_layers(eager).values(), strict=True)
        ):
            for layer in (one, other):
                layer.sinks.add_(number + 1.5)
        calls = counted(model)
        torch.testing.assert_close(model(ids).logits, eager(ids).logits, rtol=1e-5, atol=1e-5)
    assert len(calls) == len(attention_layers(model))


def by_position(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """An attention function that no inside can stand for: what it wants of positions is not known."""
    scores = query @ key.transpose(2, 3) + mask + kwargs["position_ids"][:, None, :, None] * 0.1
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def in_two_ways(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """One that looks at the number of tokens in Python."""
    scores = query @ key.transpose(2, 3) + mask
    if query.shape[2] > 4:
        scores = scores * 2
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("function", [by_position, in_two_ways])
def test_a_function_that_needs_more_than_its_tensors_is_not_compiled(function: Any) -> None:
    layer = nn.Module()
    layer.is_causal, layer.layer_idx = True, 0
    layer.weight = nn.Parameter(torch.ones(1))
    model = nn.ModuleDict({"attention": layer})
    object.__setattr__(layer, ATTENTION_FN_ATTR, function)
    forms: dict[str, Any] = {}
    tensors = torch.rand(2, 4, 3, 8), torch.rand(2, 4, 7, 8), torch.rand(2, 4, 7, 8), torch.rand(2, 1, 3, 7)
    positions = torch.arange(3).expand(2, 3)
    with observed(model, forms):
        attention(layer, *tensors, [positions], "position_ids=@0")
    (kind,) = attention_kinds(model, forms)
    report = glowplug.report(compiled())
    made = glowplug.hf.insides.Insides(model, [kind], Uncompiled(), report)
    made.compile_here()
    assert made.in_use.every == {}
    assert report.insides == []


def test_two_forms_of_calls_are_none() -> None:
    layer = nn.Module()
    layer.is_causal, layer.layer_idx = True, 0
    model = nn.ModuleDict({"attention": layer})
    object.__setattr__(layer, ATTENTION_FN_ATTR, in_two_ways)
    forms: dict[str, Any] = {}
    tensors = torch.rand(2, 4, 3, 8), torch.rand(2, 4, 7, 8), torch.rand(2, 4, 7, 8), torch.rand(2, 1, 3, 7)
    with observed(model, forms):
        attention(layer, *tensors, [], "a=1")
        attention(layer, *tensors, [], "a=2")
    assert forms == {}


@pytest.mark.inductor
def test_with_inductor() -> None:
    eager, model = build(), build()
    glowplug.compile(model, inside="compiled", experts="opaque")
    ids = families.prompt(2, 5)
    with torch.no_grad():
        model(ids)
        assert len(insides(model)) == len(attention_layers(model))
        calls = counted(model)
        torch.testing.assert_close(model(ids).logits, eager(ids).logits, rtol=1e-4, atol=1e-4)
    output, expected = (m.generate(ids, max_new_tokens=12, do_sample=False) for m in (model, eager))
    assert torch.equal(output, expected)
    assert len(calls) == 13 * len(attention_layers(model))
