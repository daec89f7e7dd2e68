"""Attention that computes with its mask or cache in a way of its own runs whole, at a cut, and the rest is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import glowplug
from glowplug.bench.families import VOCAB, build_family

FAMILIES = ["deepseek_v32"]


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


@pytest.mark.parametrize("family", FAMILIES)
def test_stamped_with_whole_attention(family: str) -> None:
    model = build_family(family, 12)
    with torch.no_grad():
        expected = passes(model)
        glowplug.compile(model, compiler="eager")
        actual = passes(model)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
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
