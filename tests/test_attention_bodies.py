"""The compiled body of attention that is several kernels: right in every form of call, and left alone otherwise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import families
import glowplug
from glowplug.bodies import Bodies, BoundBody, Forms, read_forms, trial
from glowplug.frontends.hf.bodies import body_groups
from glowplug.frontends.hf.discover import attention_layers
from glowplug.graph.capture import capture
from glowplug.layers import ForwardContext, forward_context, register_layers
from glowplug.ops.attention import ATTENTION_FN_ATTR, attention
from test_bodies import Uncompiled

FAMILIES = ["gpt_oss", "qwen3_moe", "glm4_moe"]


@pytest.fixture(autouse=True)
def always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_FASTER", 1e9)


def build(family: str = "gpt_oss") -> PreTrainedModel:
    """A model that runs its own attention function, by need (gpt-oss) or by choice."""
    model = families.build(family)
    model.set_attn_implementation("eager")
    return model


def compiled(family: str = "gpt_oss", **options: Any) -> PreTrainedModel:
    return glowplug.compile(build(family), compiler=Uncompiled(), inside="compiled", experts="opaque", **options)


def bodies(model: nn.Module) -> dict[str, BoundBody]:
    in_use = model.forward.compilation.bodies.every
    return {name: in_use[id(module)] for name, module in attention_layers(model).items()}


def counted(model: nn.Module) -> list[str]:
    """Gets a layer's name each time that its body runs."""
    calls: list[str] = []
    for name, body in bodies(model).items():

        def run(*args: Any, name: str = name, own: Any = body.run) -> Tensor:
            calls.append(name)
            return own(*args)

        body.run = run
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
    assert not any(id(layer) in model.forward.compilation.bodies.every for layer in attention_layers(model).values())


def test_it_needs_no_comparison() -> None:
    eager, model = build(), compiled(verify="off")
    ids = families.prompt(2, 5)
    with torch.no_grad():
        model(ids)
        calls = counted(model)
        torch.testing.assert_close(model(ids).logits, eager(ids).logits, rtol=1e-5, atol=1e-5)
    assert calls == list(attention_layers(model))


def forms_of_calls() -> dict[str, Any]:
    """Calls of one attention layer that its body was not made for."""
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
    context = ForwardContext(model.forward.registry, bodies=model.forward.compilation.bodies.every)
    with torch.no_grad(), forward_context(context):
        path, body = next(iter(bodies(model).items()))
        layer = model.get_submodule(path)
        generator = torch.Generator().manual_seed(0)
        query, key, value, mask, *further = body.form.make(
            {"batch": 2, "tokens": 5, "kv_tokens": 9}, torch.device("cpu"), generator
        )
        calls = counted(model)
        usual = attention(layer, query, key, value, mask, further, body.form.constants)
        assert calls == [path]
        if name == "another dtype":
            layer.double()
        arguments = forms_of_calls()[name](query, key, value, mask)
        output = attention(layer, *arguments, further, body.form.constants)
        own = layer.__dict__[ATTENTION_FN_ATTR](layer, *arguments, scaling=layer.scaling)[0]
        torch.testing.assert_close(output, own)
        assert output.shape == usual.shape
        other = body.form.constants.replace("scaling=", "scaling=1")
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
    """An attention function that no body can stand for: what it wants of positions is not known."""
    scores = query @ key.transpose(2, 3) + mask + kwargs["position_ids"][:, None, :, None] * 0.1
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def in_two_ways(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """One that looks at the number of tokens in Python."""
    scores = query @ key.transpose(2, 3) + mask
    if query.shape[2] > 4:
        scores = scores * 2
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def attends(function: Any) -> Any:
    """A model of one attention layer."""
    layer = nn.Module()
    layer.is_causal, layer.layer_idx = True, 0
    layer.weight = nn.Parameter(torch.ones(1))
    object.__setattr__(layer, ATTENTION_FN_ATTR, function)
    return nn.ModuleDict({"attention": layer})


def forms_of(model: Any, *options: str) -> tuple[Any, Forms]:
    """A model's registry, and how its layer is called with positions; once for each of these options."""
    registry, layer = register_layers(model), model["attention"]
    registry.set_order("glowplug::attention", ["attention"])

    def call(layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, positions: Tensor) -> Any:
        return [attention(layer, query, key, value, mask, [positions], option) for option in options]

    tensors = torch.rand(2, 4, 3, 8), torch.rand(2, 4, 7, 8), torch.rand(2, 4, 7, 8), torch.rand(2, 1, 3, 7)
    positions = torch.arange(3).repeat(2, 1)
    for tensor, dims in zip((*tensors, positions), ((0, 2), (0, 2), (0, 2), (0, 2, 3), (0, 1)), strict=True):
        for dim in dims:
            torch._dynamo.mark_dynamic(tensor, dim)
    given = layer, *tensors, positions
    return registry, capture(call, given, lambda captured: read_forms(captured, registry, {"L['mask']": tensors[3]}))


@pytest.mark.parametrize("function", [by_position, in_two_ways])
def test_a_function_that_needs_more_than_its_tensors_is_not_compiled(function: Any) -> None:
    model = attends(function)
    (group,) = body_groups(*forms_of(model, "position_ids=@0"))
    report = glowplug.report(compiled())
    made = Bodies([group], Uncompiled(), report)
    made.compile_here()
    assert made.in_use.every == {}
    assert report.insides == []


def test_a_layer_that_is_called_in_two_ways_gets_none() -> None:
    model = attends(in_two_ways)
    registry, forms = forms_of(model, "a=1;position_ids=@0", "a=2;position_ids=@0")
    assert forms == {"attention": None}
    assert body_groups(registry, forms) == []


@pytest.mark.inductor
def test_with_inductor() -> None:
    eager, model = build(), build()
    glowplug.compile(model, inside="compiled", experts="opaque")
    ids = families.prompt(2, 5)
    with torch.no_grad():
        model(ids)
        assert len(bodies(model)) == len(attention_layers(model))
        calls = counted(model)
        torch.testing.assert_close(model(ids).logits, eager(ids).logits, rtol=1e-4, atol=1e-4)
    output, expected = (m.generate(ids, max_new_tokens=12, do_sample=False) for m in (model, eager))
    assert torch.equal(output, expected)
    assert len(calls) == 13 * len(attention_layers(model))
