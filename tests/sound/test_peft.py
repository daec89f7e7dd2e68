"""LoRA adapters of PEFT: attached to some layers of a compiled model, switched off, merged; and compiled with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import families
import glowplug
from test_changes import eager, quiet

peft = pytest.importorskip("peft")


def attach(model: Any, layers: list[int], names: tuple[str, ...] = ("q_proj", "v_proj")) -> Any:
    """Adapters that change the output, on some layers."""
    config = peft.LoraConfig(target_modules=list(names), layers_to_transform=layers, init_lora_weights=False)
    torch.manual_seed(5)
    return peft.get_peft_model(model, config).eval()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_attached_after_compiling_is_noticed() -> None:
    model = glowplug.compile(families.build("gpt_oss", layers=8), compiler="eager")
    before = quiet(model)
    assert glowplug.report(model).strategy == "stamped"
    attach(model, [1, 6])
    expected = eager(model)
    assert not torch.allclose(expected, before, atol=1e-3)
    close(quiet(model), expected)
    (fallback,) = glowplug.report(model).fallbacks
    assert "layers.1.self_attn" in fallback.reason and "glowplug.compile" in fallback.reason


def test_attached_after_compiling_is_refused_when_strict() -> None:
    model = glowplug.compile(families.build("qwen3_moe", layers=8), compiler="eager", strict=True)
    quiet(model)
    attach(model, [3])
    with pytest.raises(glowplug.NotServableError, match=r"layers\.3\.self_attn"):
        quiet(model)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "mixtral"])
def test_every_layer_with_an_adapter_stamps(family: str) -> None:
    wrapped = attach(families.build(family, layers=10), list(range(10)))
    assert glowplug.compile(wrapped, compiler="eager") is wrapped
    model = wrapped.get_base_model()
    close(quiet(model), eager(model))
    report = glowplug.report(wrapped)
    assert (report.strategy, report.fallbacks) == ("stamped", [])


@pytest.mark.parametrize("layers", [[0], [23], [5, 6], [1, 3, 5, 7]])
def test_some_layers_with_an_adapter(layers: list[int]) -> None:
    """Layers with an adapter are of another kind; the template shows them, or all layers are traced."""
    model = families.build("qwen3_moe", layers=24)
    plain = eager(model)
    wrapped = attach(model, layers)
    glowplug.compile(wrapped, compiler="eager")
    expected = eager(model)
    assert not torch.allclose(expected, plain, atol=1e-3)
    close(quiet(model), expected)
    assert glowplug.report(wrapped).strategy in ("stamped", "hoisted")
    assert glowplug.report(wrapped).distinct_pieces < 10


def test_generate_through_the_wrapper_runs_the_program() -> None:
    model = families.build("qwen3_moe", layers=8)
    ids = torch.arange(3, 12)[None]
    wrapped = attach(model, list(range(8)))
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = wrapped.generate(input_ids=ids, **settings)
    glowplug.compile(wrapped, compiler="eager")
    assert torch.equal(wrapped.generate(input_ids=ids, **settings), expected)
    assert glowplug.report(wrapped).programs == 1
    assert glowplug.report(wrapped).fallbacks == []


@pytest.mark.parametrize("change", ["off", "merged", "second", "values"])
def test_change_of_adapters_is_never_stale(change: str) -> None:
    model = families.build("gpt_oss", layers=8)
    wrapped = attach(model, list(range(8)))
    glowplug.compile(wrapped, compiler="eager")
    before = quiet(model)
    if change == "off":
        wrapped.disable_adapter_layers()
    elif change == "merged":
        wrapped.merge_adapter()
    elif change == "second":
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        wrapped.add_adapter("second", config)
        wrapped.set_adapter("second")
        wrapped.eval()
    else:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(3)
    expected = eager(model)
    if change != "merged":  # which computes the same otherwise
        assert not torch.allclose(expected, before, atol=1e-3)
    close(quiet(model), expected)
    fallbacks = glowplug.report(wrapped).fallbacks
    assert (fallbacks == []) == (change == "values")
