"""A model that changed after it was compiled: followed or noticed at the next call, and never answered as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

import families
import glowplug
from glowplug.engine import engine_of
from glowplug.layers.watch import distinct_reads
from storing import stored_at

IDS = families.prompt(2, 9)
Change = Callable[[PreTrainedModel], Any]


def other_weights() -> dict[str, Tensor]:
    return families.build("gpt_oss", seed=5, layers=2).state_dict()


# -- changes of values alone: the program follows --


def param_data(model: PreTrainedModel) -> None:
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight.data = torch.randn_like(weight)


def every_param_data(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 1.5


def in_place(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj.mul_(-1)


def buffer_in_place(model: PreTrainedModel) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def load_state_dict(model: PreTrainedModel) -> None:
    model.load_state_dict(other_weights())


FOLLOWED = [param_data, every_param_data, in_place, buffer_in_place, load_state_dict]


# -- changes that the program can't follow: eager, with a reason --


def load_with_assign(model: PreTrainedModel) -> None:
    model.load_state_dict(other_weights(), assign=True)


def to_half(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16)


def replace_parameter(model: PreTrainedModel) -> None:
    attention = model.model.layers[1].self_attn
    attention.o_proj.weight = nn.Parameter(torch.randn_like(attention.o_proj.weight))


def replace_buffer(model: PreTrainedModel) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.25


def replace_submodule(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[0].mlp)


def replace_sinks(model: PreTrainedModel) -> None:
    attention = model.model.layers[0].self_attn
    attention.sinks = nn.Parameter(attention.sinks.detach() + 3)


def swap_layers(model: PreTrainedModel) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def add_hook(model: PreTrainedModel) -> None:
    model.model.layers[1].register_forward_hook(lambda module, args, output: output * 1.5)


def add_pre_hook(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))


def add_hook_with_kwargs(model: PreTrainedModel) -> None:
    hook = lambda module, args, kwargs, output: (output[0] * 2, *output[1:])  # noqa: E731
    model.model.layers[0].self_attn.register_forward_hook(hook, with_kwargs=True)


def add_hook_on_the_head(model: PreTrainedModel) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: output.flip(-1))


def attribute_of_one_attention(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.scaling = 0.01


def attribute_of_one_norm(model: PreTrainedModel) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 3.0


def attribute_of_one_router(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.router.top_k = 1


def attribute_of_experts(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.experts.limit = 0.1


def attribute_of_rope(model: PreTrainedModel) -> None:
    model.model.rotary_emb.attention_scaling = 2.0


def forward_of_one_layer(model: PreTrainedModel) -> None:
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda hidden_states: (torch.zeros_like(hidden_states), None)


def add_layer_type(model: PreTrainedModel) -> None:
    model.config.layer_types = ["full_attention", "full_attention"]


def fewer_layers(model: PreTrainedModel) -> None:
    model.model.layers = model.model.layers[:1]


def attention_implementation(model: PreTrainedModel) -> None:
    """Another numerics, and a mark in the output: an implementation of the test's own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def doubled(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("s_aux", None)
        return sdpa_attention_forward(module, *args, **kwargs)[0] * 2, None

    AttentionInterface.register("test_changes_doubled", doubled)
    AttentionMaskInterface.register("test_changes_doubled", sdpa_mask)
    model.set_attn_implementation("test_changes_doubled")


NOTICED = [
    load_with_assign,
    to_half,
    replace_parameter,
    replace_buffer,
    replace_submodule,
    replace_sinks,
    swap_layers,
    add_hook,
    add_pre_hook,
    add_hook_with_kwargs,
    add_hook_on_the_head,
    attribute_of_one_attention,
    attribute_of_one_norm,
    attribute_of_one_router,
    attribute_of_experts,
    attribute_of_rope,
    forward_of_one_layer,
    add_layer_type,
    fewer_layers,
    attention_implementation,
]

INLINE, OPAQUE = {"experts": "inline"}, {"experts": "opaque"}
ORDERED = {"experts": "opaque", "identity": "ordered"}
CASES = [
    *((change, options) for change in [*FOLLOWED, *NOTICED] for options in (INLINE, OPAQUE)),
    *((change, ORDERED) for change in (param_data, swap_layers, fewer_layers, replace_submodule, forward_of_one_layer)),
]


def eager(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return type(model).forward(model, IDS).logits


def quiet(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def compiled(**options: Any) -> PreTrainedModel:
    return glowplug.compile(families.build("gpt_oss", layers=2), **{"compiler": "eager", **options})


@pytest.mark.parametrize("options", [INLINE, OPAQUE], ids=lambda options: options["experts"])
@pytest.mark.parametrize("layers", [2, 8])
def test_a_stored_program_is_watched_as_a_traced_one(layers: int, options: dict[str, Any], tmp_path: Path) -> None:
    """So that what is noticed of the one, below, is noticed of the other."""
    watched = []
    for start in ("cold", "warm"):
        model = families.build("gpt_oss", layers=layers)
        glowplug.compile(model, **stored_at(tmp_path), **options, verify="off")
        quiet(model)
        assert glowplug.report(model).start == start
        compilation = engine_of(model).compilation
        names = {id(module): name for name, module in model.named_modules()}
        reads = distinct_reads(model, sorted(compilation.reads))
        watched.append((reads, {names[id(module)] for module in compilation.front.followed()}))
    assert watched[0] == watched[1]
    assert watched[0][0]


@pytest.mark.parametrize(
    ("change", "options"), CASES, ids=lambda p: p.__name__ if callable(p) else "-".join(p.values())
)
def test_change_between_calls(change: Change, options: dict[str, Any], stored: dict[str, Any]) -> None:
    model = compiled(**stored, **options, verify="off")
    before = quiet(model)
    assert torch.equal(before, eager(model))
    change(model)
    expected = eager(model)
    assert not torch.equal(expected, before)
    for _ in range(2):
        torch.testing.assert_close(quiet(model), expected, rtol=1e-5, atol=1e-5)
    fallbacks = glowplug.report(model).fallbacks
    if change in FOLLOWED:
        assert fallbacks == []
    elif fallbacks:  # behind an opaque op the layer's own Python runs, and follows by itself
        (fallback,) = fallbacks
        assert "changed after compiling" in fallback.reason
        assert "compile(model) again" in fallback.reason
    else:
        assert options["experts"] == "opaque" or change is add_layer_type  # which some transformers read in each call


@pytest.mark.parametrize("change", [param_data, replace_parameter, replace_submodule, add_hook, fewer_layers])
def test_compiling_again(change: Change) -> None:
    model = compiled()
    quiet(model)
    change(model)
    quiet(model)
    assert glowplug.compile(model, compiler="eager") is model
    torch.testing.assert_close(quiet(model), eager(model), rtol=1e-5, atol=1e-5)
    report = glowplug.report(model)
    assert report.fallbacks == []
    assert report.programs == 1


@pytest.mark.parametrize("change", [add_hook, replace_parameter, attribute_of_one_attention])
def test_strict_raises_after_a_change(change: Change) -> None:
    model = compiled(strict=True)
    quiet(model)
    change(model)
    with pytest.raises(glowplug.NotServableError, match="changed after compiling"):
        quiet(model)


def test_a_hook_that_was_there_before() -> None:
    model = families.build("gpt_oss", layers=2)
    add_hook(model)
    expected = eager(model)
    glowplug.compile(model, compiler="eager")
    torch.testing.assert_close(quiet(model), expected, rtol=1e-5, atol=1e-5)


def test_a_hook_that_comes_and_goes() -> None:
    model = compiled()
    before = quiet(model)
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: output * 2)
    hooked = quiet(model)
    assert torch.equal(hooked, eager(model))
    handle.remove()
    assert torch.equal(quiet(model), before)
    assert not torch.equal(hooked, before)


def test_a_global_hook() -> None:
    model = compiled()
    before = quiet(model)
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 1.5 if isinstance(module, nn.Linear) else None
    )
    try:
        expected, output = eager(model), quiet(model)
    finally:
        hook.remove()
    assert not torch.equal(expected, before)
    assert torch.equal(output, expected)
    assert torch.equal(quiet(model), before)


def test_a_hook_on_the_model_itself() -> None:
    """Torch runs it around the compiled forward: nothing to notice, and it must run once."""
    model, runs = compiled(), []
    quiet(model)
    model.register_forward_hook(lambda *_: runs.append(1))
    quiet(model)
    assert runs == [1]


@pytest.mark.parametrize("experts", ["inline", "opaque"])
def test_a_patched_class(experts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that patches modeling code, as many do, after the model was compiled."""
    model = compiled(experts=experts)
    before = quiet(model)
    attention = type(model.model.layers[0].self_attn)
    original = attention.forward

    def patched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output, weights = original(self, *args, **kwargs)
        return output * 3, weights

    monkeypatch.setattr(attention, "forward", patched)
    expected = eager(model)
    assert not torch.equal(expected, before)
    torch.testing.assert_close(quiet(model), expected, rtol=1e-5, atol=1e-5)


def test_another_dtype_in_full() -> None:
    """Double precision, which the grouped matrix product does not know: with experts that do."""
    model = families.build("gpt_oss", layers=2)
    model.set_experts_implementation("eager")
    glowplug.compile(model, compiler="eager")
    assert torch.equal(quiet(model), eager(model))
    model.to(torch.float64)
    output = quiet(model)
    assert output.dtype is torch.float64
    assert torch.equal(output, eager(model))
    assert "changed after compiling" in glowplug.report(model).fallbacks[0].reason
    glowplug.compile(model, compiler="eager")
    torch.testing.assert_close(quiet(model), eager(model), rtol=1e-10, atol=1e-10)
    assert glowplug.report(model).fallbacks == []


def test_requires_grad_may_flip() -> None:
    model = compiled()
    before = quiet(model)
    for flag in (False, True, False):
        model.requires_grad_(flag)
        assert torch.equal(quiet(model), before)
    assert glowplug.report(model).fallbacks == []
    assert torch.equal(model(IDS).logits, before)  # frozen, in grad mode
    assert glowplug.report(model).fallbacks == []


# -- between two steps of decoding --


class AtStep(LogitsProcessor):
    """Applies a change while `generate` runs."""

    def __init__(self, model: PreTrainedModel, change: Change, step: int = 3) -> None:
        self.model, self.change, self.left = model, change, step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            self.change(self.model)
        return scores


def changed_midway(model: PreTrainedModel, change: Change) -> Tensor:
    processors = LogitsProcessorList([AtStep(model, change)])
    return model.generate(IDS, max_new_tokens=16, do_sample=False, logits_processor=processors)


WITH_A_CACHE_IMPOSSIBLE = (to_half, swap_layers, add_layer_type)  # the cache keeps dtype and window of each layer
MIDWAY = [change for change in [*FOLLOWED, *NOTICED] if change not in WITH_A_CACHE_IMPOSSIBLE]


@pytest.mark.parametrize("change", MIDWAY, ids=lambda change: change.__name__)
def test_change_between_two_steps(change: Change, stored: dict[str, Any]) -> None:
    expected = changed_midway(families.build("gpt_oss", layers=2), change)
    model = compiled(**stored, verify="off")
    assert torch.equal(changed_midway(model, change), expected)
    if change in FOLLOWED:
        assert glowplug.report(model).fallbacks == []


def test_changes_midway_are_visible_at_all() -> None:
    untouched = families.build("gpt_oss", layers=2).generate(IDS, max_new_tokens=16, do_sample=False)
    seen = [
        change.__name__
        for change in MIDWAY
        if not torch.equal(changed_midway(families.build("gpt_oss", layers=2), change), untouched)
    ]
    assert len(seen) >= len(MIDWAY) - 3, seen


@pytest.mark.parametrize("experts", ["inline", "opaque"])
def test_generate_may_switch_experts_implementations(experts: str) -> None:
    """As transformers does between prefill and decode on a GPU: they compute the same, and nothing runs eager."""
    model = compiled(experts=experts)
    for implementation in ("grouped_mm", "batched_mm", "eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(quiet(model), eager(model), rtol=1e-4, atol=1e-4)
    assert glowplug.report(model).fallbacks == []
