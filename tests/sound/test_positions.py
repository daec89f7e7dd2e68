"""Calls without `position_ids`: a compiled model makes of its mask and its cache what the plain one does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    BioGptConfig,
    BioGptForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    StaticCache,
)

import families
import glowplug

SIZES: dict[str, Any] = {
    "vocab_size": families.VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def opt() -> PreTrainedModel:
    return seeded(OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=32)))


def gpt2() -> PreTrainedModel:
    return seeded(
        GPT2LMHeadModel(GPT2Config(vocab_size=families.VOCAB, n_embd=32, n_layer=8, n_head=4, n_positions=128))
    )


def biogpt() -> PreTrainedModel:
    return seeded(BioGptForCausalLM(BioGptConfig(**SIZES, intermediate_size=32)))


def llama() -> PreTrainedModel:
    return seeded(LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=32)))


def bamba() -> PreTrainedModel:
    """Begins to count anew in each step."""
    mamba = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
    config = BambaConfig(**SIZES, **mamba, intermediate_size=32, num_key_value_heads=2, attn_layer_indices=[1, 3, 5, 7])
    return seeded(BambaForCausalLM(config))


class Tripled(LlamaForCausalLM):
    """Works out positions in a way that is nobody else's."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any
    ) -> Any:
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.cumsum(-1) * 3)[:, -input_ids.shape[1] :]
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


def seeded(model: PreTrainedModel) -> PreTrainedModel:
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1)
    return model


MODELS = {made.__name__: made for made in (opt, gpt2, biogpt, llama, bamba)}


def compiled(model: PreTrainedModel, **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model and its compiled twin."""
    return model, glowplug.compile(copy.deepcopy(model), compiler="eager", **options)


def same(eager: PreTrainedModel, twin: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Both answer a call equally; the compiled one's answer."""
    with torch.no_grad():
        expected, found = (model(*args, **copy.deepcopy(kwargs)) for model in (eager, twin))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4, equal_nan=True)
    return found


def masks(tokens: int) -> dict[str, Tensor]:
    """Masks of three sequences of 9 tokens or more."""
    full = torch.ones(3, tokens, dtype=torch.long)
    left, right, both, whole, inside = (full.clone() for _ in range(5))
    left[0, :4], left[1, :1] = 0, 0
    right[0, 5:9], right[1, 8:9] = 0, 0
    both[0, :3], both[1, 6:9] = 0, 0
    whole[1, :9] = 0
    inside[2, 3:5] = 0
    return {"full": full, "left": left, "right": right, "both": both, "a row of padding": whole, "inside": inside}


@pytest.mark.parametrize("verify", ["once", "off"])
@pytest.mark.parametrize("name", MODELS)
def test_padded_masks_without_positions(name: str, verify: str) -> None:
    eager, twin = compiled(MODELS[name](), verify=verify)
    ids = families.prompt(3, 9)
    same(eager, twin, ids)
    for mask in masks(9).values():
        for form in (mask, mask.bool(), mask.float()):
            same(eager, twin, ids, attention_mask=form)
        same(eager, twin, ids, attention_mask=mask, use_cache=False)
        same(eager, twin, ids, attention_mask=mask, logits_to_keep=2)
        same(eager, twin, ids[:1], attention_mask=mask[:1])
    report = glowplug.report(twin)
    assert report.fallbacks == []
    assert report.strategy == "stamped"


@pytest.mark.parametrize("family", sorted(set(families.FAMILIES) - {"ernie4_5_vl_moe"}))
def test_padded_masks_without_positions_of_every_family(family: str) -> None:
    eager, twin = compiled(families.build(family))
    for mask in masks(9).values():
        same(eager, twin, families.prompt(3, 9), attention_mask=mask)
    assert glowplug.report(twin).fallbacks == []


@pytest.mark.parametrize("name", MODELS)
def test_the_first_call_has_a_padded_mask_and_no_positions(name: str) -> None:
    eager, twin = compiled(MODELS[name]())
    same(eager, twin, families.prompt(3, 9), attention_mask=masks(9)["both"])
    assert glowplug.report(twin).fallbacks == []


@pytest.mark.parametrize("name", MODELS)
def test_steps_on_a_cache_without_positions(name: str) -> None:
    """Several tokens at once and one by one, under each mask and under none."""
    eager, twin = compiled(MODELS[name]())
    ids = families.prompt(3, 14)
    for mask in (*masks(14).values(), None):
        caches = [DynamicCache(config=model.config) for model in (eager, twin)]
        seen = 0
        for tokens in (9, 1, 3, 1):
            stop = seen + tokens
            given = {"attention_mask": mask[:, :stop]} if mask is not None else {}
            with torch.no_grad():
                expected, found = (
                    model(ids[:, seen:stop], past_key_values=cache, **given).logits
                    for model, cache in zip((eager, twin), caches, strict=True)
                )
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
            seen = stop
    assert glowplug.report(twin).fallbacks == []


def test_static_caches_and_embeddings() -> None:
    eager, twin = compiled(opt())
    ids, mask = families.prompt(3, 9), masks(12)["both"]
    embeds = eager.get_input_embeddings()(ids)
    same(eager, twin, inputs_embeds=embeds, attention_mask=mask[:, :9])
    caches = [StaticCache(config=model.config, max_cache_len=16) for model in (eager, twin)]
    for seen, stop in ((0, 7), (7, 8), (8, 9)):
        with torch.no_grad():
            expected, found = (
                model(ids[:, seen:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits
                for model, cache in zip((eager, twin), caches, strict=True)
            )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert glowplug.report(twin).fallbacks == []


def test_generate_and_packed_positions() -> None:
    eager, twin = compiled(opt())
    ids, mask = families.prompt(3, 9), masks(9)["left"]
    tokens = [m.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False) for m in (eager, twin)]
    assert torch.equal(*tokens)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]] * 3)
    for positions in (packed, packed.int(), packed[:1]):
        same(eager, twin, ids, position_ids=positions)
        same(eager, twin, ids, position_ids=positions, attention_mask=mask)
    assert glowplug.report(twin).fallbacks == []


def test_positions_of_other_forms_are_answered_as_eager_does() -> None:
    eager, twin = compiled(gpt2())
    same(eager, twin, families.prompt(1, 9), position_ids=torch.arange(9))
    (fallback,) = glowplug.report(twin).fallbacks
    assert "position_ids" in fallback.reason


def test_a_rule_that_nobody_knows_is_left_to_the_model() -> None:
    config = LlamaConfig(**SIZES, intermediate_size=32)
    eager, twin = compiled(seeded(Tripled(config)))
    ids, mask = families.prompt(3, 9), masks(9)["left"]
    same(eager, twin, ids)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    same(eager, twin, ids, attention_mask=mask, position_ids=positions)
    assert glowplug.report(twin).fallbacks == []
    for given in masks(9).values():
        same(eager, twin, ids, attention_mask=given)
    (fallback,) = glowplug.report(twin).fallbacks
    assert "pass position_ids" in fallback.reason
