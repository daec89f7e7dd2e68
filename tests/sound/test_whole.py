"""Attention that computes with its mask or cache in a way of its own runs whole, at a cut, and the rest is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, GlmMoeDsaConfig, GlmMoeDsaForCausalLM, PreTrainedModel

import glowplug
from glowplug.bench.families import VOCAB, build_family
from glowplug.frontends.hf.caches import new_cache

FAMILIES = {"deepseek_v32": 12, "glm_moe_dsa": 12, "hy_v4": 14, "zaya": 8}


def prompt(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def passes(model: PreTrainedModel) -> list[torch.Tensor]:
    """Logits of texts of several sizes, one of them padded on the left, each with steps on its cache."""
    outputs = []
    for batch, parts in ((1, (9, 1, 1)), (2, (7, 1, 3)), (1, (1, 1))):
        cache, seen = DynamicCache(config=model.config.get_text_config()), 0
        mask = torch.ones(batch, sum(parts), dtype=torch.long)
        if batch > 1:
            mask[0, :2] = 0
        ids = prompt(batch, sum(parts))
        for part in parts:
            given: dict[str, Any] = {"attention_mask": mask[:, : seen + part], "past_key_values": cache}
            outputs.append(model(input_ids=ids[:, seen : seen + part], use_cache=True, **given).logits)
            seen += part
    return outputs


def assert_equal_compiled(model: PreTrainedModel) -> None:
    """Its passes are the same before and after it is compiled."""
    with torch.no_grad():
        expected = passes(model)
        glowplug.compile(model, compiler="eager")
        actual = passes(model)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_stamped_with_whole_attention(family: str) -> None:
    model = build_family(family, FAMILIES[family])
    assert_equal_compiled(model)
    report = glowplug.report(model)
    assert (report.strategy, report.attention, report.fallbacks) == ("stamped", "whole", [])
    assert "attention whole" in str(report)


def test_baked_too_and_ordered_says_why_not() -> None:
    for identity, attention in (("baked", "whole"), ("ordered", "cut")):
        model = build_family("deepseek_v32", 4)
        glowplug.compile(model, compiler="eager", identity=identity)
        with torch.no_grad():
            expected = type(model).forward(model, input_ids=prompt(1, 5)).logits
            torch.testing.assert_close(model(input_ids=prompt(1, 5)).logits, expected, rtol=1e-5, atol=1e-5)
        report = glowplug.report(model)
        assert report.attention == attention
        assert (report.fallbacks != []) == (identity == "ordered")


def glm(kinds: list[str], indexers: list[str]) -> PreTrainedModel:
    """A GLM-MoE-DSA whose layers are such, and choose or share the tokens that they attend to."""
    torch.manual_seed(0)
    base = build_family("glm_moe_dsa", len(kinds)).config.to_dict()
    config = GlmMoeDsaConfig(**{**base, "mlp_layer_types": kinds, "indexer_types": indexers})
    return GlmMoeDsaForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("period", [1, 2])
def test_a_first_layer_that_gets_less_than_the_others(period: int) -> None:
    """Attention hands on what it chose; the first layer gets none. That keeps nobody from stamping the rest."""
    indexers = ["full" if layer % period == 0 else "shared" for layer in range(12)]
    model = glm(["sparse"] * 12, indexers)
    assert_equal_compiled(model)
    report = glowplug.report(model)
    assert (report.strategy, report.fallbacks) == ("stamped", [])


def test_what_is_handed_on_is_never_computed_with() -> None:
    model = glm(["sparse"] * 6, ["full"] * 6)

    class Counting(type(model.model.layers[0])):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            output, chosen = super().forward(hidden_states, *args, **kwargs)
            return output * (1 + chosen.float().mean() * 1e-3), chosen

    for layer in model.model.layers:
        layer.__class__ = Counting
    with torch.no_grad():
        expected = passes(model)
        glowplug.compile(model, compiler="eager")
        for one, other in zip(passes(model), expected, strict=True):
            assert torch.equal(one, other)
    report = glowplug.report(model)
    assert report.strategy == "eager"


@pytest.mark.parametrize(("family", "stamped"), [("minimax", False), ("inkling_text", True)])
def test_masks_beyond_a_window_are_the_models_own(family: str, stamped: bool) -> None:
    """transformers' maker of masks leaves out both models' windows, unlike the models. Where glowplug makes the mask as
    its name says, it is right; else the comparison, within a short window, finds out."""
    model = build_family(family, 8)
    if family == "minimax":
        model.config.sliding_window = 8
    ids = prompt(1, 20)

    def steps() -> list[torch.Tensor]:
        cache = new_cache(model)
        parts = (ids[:, :17], ids[:, 17:18], ids[:, 18:])
        return [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts]

    with torch.no_grad():
        expected = steps()
        glowplug.compile(model, compiler="eager")
        actual = steps()
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    report = glowplug.report(model)
    assert (report.strategy != "eager") == stamped
    assert stamped or "with a window of 4 tokens" in report.fallbacks[0].reason
