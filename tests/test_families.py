"""Every family of models, whole, against its own eager self: tokens, logits, pieces, and no step down to eager."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

import families
import glowplug
from glowplug import LayerOrderError, Report

IDENTITIES = ("hoisted", "ordered", "baked")
EXPERTS = ("inline", "opaque")
ERNIE = "ernie4_5_vl_moe"

COMBINATIONS = [
    pytest.param(family, identity, experts, id=f"{family}-{identity}-{experts}")
    for family in families.FAMILIES
    for identity in IDENTITIES
    for experts in EXPERTS
    if (family, identity, experts) != (ERNIE, "ordered", "opaque")  # refused: see below
]


def generate(model: PreTrainedModel, tokens: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens, and the logits of every step."""
    output = model.generate(
        families.prompt(2, 12),
        max_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return output.sequences, torch.stack(output.logits)


@functools.cache
def reference(family: str) -> tuple[Tensor, Tensor]:
    """What the model itself says, before glowplug."""
    return generate(families.build(family), 64)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_references_are_worth_comparing_with() -> None:
    """Random weights must not make a model repeat one token, or two models agree."""
    for family in families.FAMILIES:
        tokens, _ = reference(family)
        assert len(set(tokens[:, 12:].flatten().tolist())) > 8, family
    wrong = families.build("mixtral", seed=1)
    assert not torch.equal(generate(wrong, 8)[0], reference("mixtral")[0][:, :20])


@pytest.mark.parametrize(("family", "identity", "experts"), COMBINATIONS)
def test_tokens_and_logits_are_eagers(family: str, identity: str, experts: str) -> None:
    model = families.build(family)
    steps = 64 if identity == "hoisted" else 12
    glowplug.compile(model, compiler="eager", identity=identity, experts=experts)
    tokens, logits = generate(model, steps)
    expected_tokens, expected_logits = reference(family)
    assert torch.equal(tokens, expected_tokens[:, : 12 + steps])
    assert error(logits, expected_logits[:steps]) < 1e-5
    report = glowplug.report(model)
    assert report.fallbacks == []
    assert report.strategy == identity
    assert report.programs == 1
    assert report.experts == ("none" if family == "qwen3" else experts)


@pytest.mark.parametrize("family", [family for family in families.FAMILIES if family != ERNIE])
def test_one_forward_call(family: str) -> None:
    """All positions' logits, no cache handed in, several sizes."""
    model = families.build(family)
    glowplug.compile(model, compiler="eager")
    with torch.no_grad():
        for batch, tokens in ((1, 1), (2, 9), (3, 20)):
            ids = families.prompt(batch, tokens)
            expected = type(model).forward(model, ids)
            output = model(ids)
            assert type(output) is type(expected)
            assert error(output.logits, expected.logits) < 1e-5
            assert output.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length() == tokens
    assert glowplug.report(model).fallbacks == []


def test_ernie_without_positions_runs_eager() -> None:
    """This model works out three-axis positions in its forward: said once, and right."""
    model, ids = families.build(ERNIE), families.prompt(2, 9)
    glowplug.compile(model, compiler="eager")
    with torch.no_grad():
        expected = type(model).forward(model, ids).logits
        for _ in range(2):
            assert torch.equal(model(ids).logits, expected)
    (fallback,) = glowplug.report(model).fallbacks
    assert "position_ids" in fallback.reason


# -- the order that ERNIE breaks ------------------------------------------------


class Seen(LogitsProcessor):
    """Counts how many steps' logits got out."""

    steps = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps += 1
        return scores


@pytest.mark.parametrize("verify", ["once", "off"])
@pytest.mark.parametrize("option", [{"identity": "ordered"}, {"fast_moe_cold_start": True}], ids=str)
def test_ernie_ordered_is_refused_before_any_output(verify: str, option: dict[str, Any]) -> None:
    model, seen = families.build(ERNIE), Seen()
    glowplug.compile(model, compiler="eager", experts="opaque", verify=verify, **option)
    for _ in range(2):  # and again: the first refusal must not leave a half-built program behind
        with pytest.raises(LayerOrderError) as caught:
            generate(model, 4, logits_processor=LogitsProcessorList([seen]))
        message = str(caught.value)
        assert "vision_moe.experts" in message
        assert 'identity="hoisted"' in message
    assert seen.steps == 0


def test_ernie_ordered_names_only_what_does_not_run() -> None:
    model = families.build(ERNIE)
    glowplug.compile(model, compiler="eager", experts="opaque", identity="ordered")
    with pytest.raises(LayerOrderError) as caught:
        generate(model, 2)
    assert "text_moe" not in str(caught.value).split("did not run", 1)[1].split(")", 1)[0]


def test_ernie_ordered_without_the_check_is_garbage() -> None:
    """What is being refused: with no check, every name after the first is wrong, and nobody says so."""
    model = families.build(ERNIE)
    glowplug.compile(model, compiler="eager", experts="opaque", identity="ordered", verify="off")
    model.forward.check_order = False
    _, logits = generate(model, 4)
    assert error(logits[0], reference(ERNIE)[1][0]) > 1e-2
    assert glowplug.report(model).fallbacks == []


def test_ernie_hoisted_after_ordered() -> None:
    """The advice in the message is sound."""
    model = families.build(ERNIE)
    glowplug.compile(model, compiler="eager", experts="opaque", identity="ordered")
    with pytest.raises(LayerOrderError):
        generate(model, 2)
    glowplug.compile(model, compiler="eager", experts="opaque", identity="hoisted")
    tokens, _ = generate(model, 12)
    assert torch.equal(tokens, reference(ERNIE)[0][:, :24])
    assert glowplug.report(model).fallbacks == []


# -- how many pieces ------------------------------------------------

DEPTHS = {"gpt_oss": 6, "glm4_moe": 6, ERNIE: 5, "qwen3_moe": 6, "mixtral": 5, "deepseek_v3": 5, "llama4": 8}
"""Deep enough that layers of one kind come more than once in the same surroundings."""


def pieces(family: str, layers: int, identity: str, experts: str) -> Report:
    model = families.build(family, layers=layers)
    glowplug.compile(model, compiler="eager", identity=identity, experts=experts, verify="off")
    generate(model, 1)
    report = glowplug.report(model)
    assert report.fallbacks == []
    return report


@pytest.mark.parametrize("family", DEPTHS)
def test_distinct_pieces(family: str) -> None:
    layers = DEPTHS[family]
    hoisted = pieces(family, layers, "hoisted", "opaque")
    baked = pieces(family, layers, "baked", "opaque")
    # Latent attention computes between the cache and the attention: a piece more for each layer.
    assert hoisted.pieces == baked.pieces == (2 * layers + 1 if family == "deepseek_v3" else layers + 1)
    assert hoisted.distinct_pieces < baked.distinct_pieces <= layers + 2
    if family != ERNIE:
        assert pieces(family, layers, "ordered", "opaque").distinct_pieces == hoisted.distinct_pieces


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3", "llama4"])
def test_distinct_pieces_do_not_grow_with_depth(family: str) -> None:
    shallow, deep = pieces(family, 8, "hoisted", "inline"), pieces(family, 12, "hoisted", "inline")
    assert shallow.distinct_pieces == deep.distinct_pieces < shallow.pieces < deep.pieces
