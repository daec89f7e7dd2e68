"""A model that is changed for a while, and changed back: its program serves again, and the report says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain_nets import Net
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import families
import glowplug

IDS = families.prompt(2, 5)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@contextmanager
def hook(model: PreTrainedModel) -> Iterator[None]:
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: output * 1.5)
    yield
    handle.remove()


@contextmanager
def pre_hook(model: PreTrainedModel) -> Iterator[None]:
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
    yield
    handle.remove()


@contextmanager
def attribute(model: PreTrainedModel) -> Iterator[None]:
    attention = model.model.layers[1].self_attn
    before, attention.scaling = attention.scaling, 0.01
    yield
    attention.scaling = before


@contextmanager
def attribute_of_equal_value(model: PreTrainedModel) -> Iterator[None]:
    """Back to the value that it had, by another object."""
    attention = model.model.layers[1].self_attn
    before, attention.scaling = attention.scaling, 0.01
    yield
    attention.scaling = float(repr(before))


@contextmanager
def new_forward(model: PreTrainedModel) -> Iterator[None]:
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda hidden_states: (own(hidden_states)[0] * 2, None)
    yield
    del mlp.forward


@contextmanager
def weight(model: PreTrainedModel) -> Iterator[None]:
    layer = model.model.layers[1].self_attn.o_proj
    before, layer.weight = layer.weight, nn.Parameter(layer.weight * 2, requires_grad=False)
    yield
    layer.weight = before


@contextmanager
def submodule(model: PreTrainedModel) -> Iterator[None]:
    layers = model.model.layers
    layers[0], layers[2] = layers[2], layers[0]
    yield
    layers[0], layers[2] = layers[2], layers[0]


@contextmanager
def implementation(model: PreTrainedModel) -> Iterator[None]:
    def doubled(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("s_aux", None)
        return sdpa_attention_forward(module, *args, **kwargs)[0] * 2, None

    AttentionInterface.register("test_changed_back", doubled)
    AttentionMaskInterface.register("test_changed_back", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("test_changed_back")
    yield
    model.set_attn_implementation(before)


@contextmanager
def precision(model: PreTrainedModel) -> Iterator[None]:
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    model.to(torch.bfloat16)
    yield
    for name, parameter in model.named_parameters():
        parameter.data = weights[name]
    for module, tensors in buffers:
        module._buffers.update(tensors)


Change = Callable[[PreTrainedModel], Any]
CHANGES: list[Change] = [
    hook,
    pre_hook,
    attribute,
    attribute_of_equal_value,
    new_forward,
    weight,
    submodule,
    implementation,
    precision,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("experts", ["inline", "opaque"])
def test_the_program_serves_again(change: Change, experts: str, stored: dict[str, Any]) -> None:
    eager, model = families.build("gpt_oss"), families.build("gpt_oss")
    glowplug.compile(model, experts=experts, **stored)
    report = glowplug.report(model)
    assert report.serving == "nothing yet"
    before = logits(model)
    assert report.serving == "program"
    for _ in range(3):
        with change(model), change(eager):
            expected, found = logits(eager), logits(model)
            assert not torch.allclose(expected.float(), before, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert report.serving.startswith("eager: ") or change is pre_hook  # of what runs behind an op
        assert torch.equal(logits(model), before)
        assert report.serving == "program"
    assert report.programs == 1


def test_training_around_an_evaluation() -> None:
    model = families.build("gpt_oss")
    glowplug.compile(model, compiler="eager")
    before = logits(model)
    for _ in range(3):
        model.train()
        logits(model)
        assert "training mode" in glowplug.report(model).serving
        model.eval()
        assert torch.equal(logits(model), before)
        assert glowplug.report(model).serving == "program"


def test_an_adapter_that_is_disabled_for_a_while() -> None:
    def make() -> Any:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return get_peft_model(families.build("qwen3_moe"), config).eval()

    eager, model = make(), make()
    glowplug.compile(model, compiler="eager")
    adapted = logits(model)
    torch.testing.assert_close(adapted, logits(eager), rtol=1e-5, atol=1e-5)
    for _ in range(2):
        with model.disable_adapter(), eager.disable_adapter():
            found = logits(model)
            torch.testing.assert_close(found, logits(eager), rtol=1e-5, atol=1e-5)
            assert not torch.allclose(found, adapted)
        assert torch.equal(logits(model), adapted)
        assert glowplug.report(model).serving == "program"


def test_assisted_by_its_own_first_layers() -> None:
    eager, model = families.build("qwen3_moe", layers=6), families.build("qwen3_moe", layers=6)
    glowplug.compile(model, compiler="eager")
    ids = families.prompt(1, 6)
    logits(model)
    expected = eager.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, assistant_early_exit=2), expected)
    logits(model)
    assert glowplug.report(model).serving == "program"


def test_what_kept_a_model_from_being_compiled_was_there_for_a_while() -> None:
    """A hook that no trace can follow, at the first call: once it is gone the model is compiled."""
    eager, model = families.build("qwen3_moe"), families.build("qwen3_moe")
    glowplug.compile(model, compiler="eager")
    seen: list[float] = []
    handle = model.model.layers[1].register_forward_hook(lambda m, args, output: seen.append(output.sum().item()))
    torch.testing.assert_close(logits(model), logits(eager), rtol=1e-5, atol=1e-5)
    assert glowplug.report(model).serving.startswith("eager: ")
    assert len(seen) > 0
    handle.remove()
    torch.testing.assert_close(logits(model), logits(eager), rtol=1e-5, atol=1e-5)
    assert glowplug.report(model).serving == "program"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).relu() * self.scale


def test_a_plain_module_that_is_changed_again_and_again() -> None:
    torch.manual_seed(0)
    model = Net(Layer, 8).eval().requires_grad_(False)
    x = torch.randn(3, 8)
    glowplug.compile(model, compiler="eager")
    before = model(x)
    for _ in range(12):
        for layer in model.layers:
            layer.scale = 2.0
        assert not torch.allclose(model(x), before)
        for layer in model.layers:
            layer.scale = 1.0
        assert torch.equal(model(x), before)
    report = glowplug.report(model)
    assert report.serving == "program"
    assert report.fallbacks == []
    assert report.programs == 2


def test_a_plain_module_that_trains_in_between() -> None:
    torch.manual_seed(0)
    model = Net(Layer, 8).eval().requires_grad_(False)
    x = torch.randn(3, 8)
    glowplug.compile(model, compiler="eager")
    model.train()
    model(x)
    model.eval()
    model(x)
    assert glowplug.report(model).strategy == "stamped"
    assert glowplug.report(model).fallbacks == []
