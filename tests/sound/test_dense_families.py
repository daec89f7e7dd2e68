"""Decoder-only families without experts whose attention keeps to no interface: alibi, masks and caches of their own
ways. They are stamped, and answer as eager does."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CodeGenConfig,
    CodeGenForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    StaticCache,
)

import families
import glowplug

DEPTH = 12
V = families.VOCAB
FALCON: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GPT: dict[str, Any] = {"vocab_size": V, "n_embd": 32, "n_layer": DEPTH, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
NEO = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_layers": DEPTH,
    "num_heads": 4,
    "attention_types": [[["global", "local"], DEPTH // 2]],
    "window_size": 4,
    "max_position_embeddings": 64,
    "intermediate_size": 32,
}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=32, n_layer=DEPTH, n_head=4)),
    "falcon with alibi": lambda: FalconForCausalLM(FalconConfig(**FALCON, alibi=True)),
    "falcon, eager, with alibi": lambda: FalconForCausalLM(
        FalconConfig(**FALCON, alibi=True, attn_implementation="eager")
    ),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**FALCON)),
    "falcon, newer": lambda: FalconForCausalLM(FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2)),
    "gpt neo": lambda: GPTNeoForCausalLM(GPTNeoConfig(**NEO)),
    "codegen": lambda: CodeGenForCausalLM(CodeGenConfig(**GPT)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**GPT)),
    "mpt": lambda: MptForCausalLM(MptConfig(vocab_size=V, d_model=32, n_layers=DEPTH, n_heads=4, max_seq_len=64)),
}


def pair(name: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model with seeded weights, and its compiled twin."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model, glowplug.compile(copy.deepcopy(model), compiler="eager", **options)


@functools.cache
def pair_with_caches(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same, for calls that all have a cache."""
    return pair(name)


@pytest.fixture(scope="module", autouse=True)
def forget_models() -> Iterator[None]:
    """Keep none of them for the rest of the suite."""
    yield
    pair_with_caches.cache_clear()


def same(eager: PreTrainedModel, twin: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        expected, found = (model(*args, **copy.deepcopy(kwargs)).logits for model in (eager, twin))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def stamped(twin: PreTrainedModel) -> None:
    report = glowplug.report(twin)
    assert report.fallbacks == []
    assert report.strategy == "stamped"
    assert 0 < report.template_layers < DEPTH


def padded(tokens: int) -> list[Tensor | None]:
    left, right = (torch.ones(3, tokens, dtype=torch.long) for _ in range(2))
    left[0, :4], left[1, :1] = 0, 0
    right[0, 5:9], right[2, 8:9] = 0, 0
    return [None, torch.ones_like(left), left, right]


@pytest.mark.parametrize("verify", ["once", "off"])
@pytest.mark.parametrize("name", MODELS)
def test_calls(name: str, verify: str) -> None:
    eager, twin = pair(name, verify=verify)
    ids = families.prompt(3, 9)
    for mask in padded(9):
        same(eager, twin, ids, attention_mask=mask)
        same(eager, twin, ids, attention_mask=mask, use_cache=False)
        same(eager, twin, ids[:1], attention_mask=mask[:1] if mask is not None else None)
        if mask is not None:
            same(eager, twin, ids, attention_mask=mask.bool())
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            same(eager, twin, ids, attention_mask=mask, position_ids=positions)
    stamped(twin)


@pytest.mark.parametrize("name", MODELS)
def test_steps_on_a_cache(name: str) -> None:
    eager, twin = pair_with_caches(name)
    ids = families.prompt(3, 14)
    for mask in padded(14):
        caches = [DynamicCache(config=model.config) for model in (eager, twin)]
        seen = 0
        for tokens in (9, 1, 3, 1):
            stop = seen + tokens
            given = mask[:, :stop] if mask is not None else None
            with torch.no_grad():
                expected, found = (
                    model(ids[:, seen:stop], attention_mask=given, past_key_values=cache, use_cache=True).logits
                    for model, cache in zip((eager, twin), caches, strict=True)
                )
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            seen = stop
    stamped(twin)


@pytest.mark.parametrize("name", MODELS)
def test_generate(name: str) -> None:
    eager, twin = pair_with_caches(name)
    ids, mask = families.prompt(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    for given in ({}, {"attention_mask": mask}, {"attention_mask": mask, "num_beams": 2}):
        tokens = [
            m.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None, **given)
            for m in (eager, twin)
        ]
        assert torch.equal(*tokens)
    stamped(twin)


@pytest.mark.parametrize("name", ["bloom", "falcon with alibi", "gpt neo"])
def test_what_a_program_cannot_take_is_answered_as_eager_does(name: str) -> None:
    """Static caches, masks of four dims and of floating point: equal, where the plain model answers."""
    eager, twin = pair(name)
    ids, mask = families.prompt(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    square = torch.ones(9, 9).tril().bool().expand(2, 1, 9, 9)
    wide = torch.cat([mask, torch.zeros(2, 7, dtype=torch.long)], 1)
    forms: list[dict[str, Any]] = [
        {"attention_mask": mask.float()},
        {"attention_mask": square},
        {"attention_mask": mask, "static": True},
        {"attention_mask": wide, "static": True},
        {"static": True},
        {"attention_mask": wide},
    ]
    for form in forms:
        answers: list[Tensor] = []
        for model in (eager, twin):
            given = dict(form)
            if given.pop("static", False):
                given["past_key_values"] = StaticCache(config=model.config, max_cache_len=16)
            with torch.no_grad(), contextlib.suppress(RuntimeError, ValueError):  # the plain model refuses some
                answers.append(model(ids, **given).logits)
            if not answers:
                break
        if answers:
            torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-4, msg=f"{name} {form}")
