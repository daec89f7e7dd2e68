"""Rope whose tables change with the length of the sequence (`dynamic`, `longrope`) is served, on short and long prompts
and back, as the model itself does it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
)

import glowplug
from families import VOCAB, prompt

ORIGINAL = 32
"""Tokens that the models were trained on; longer prompts change their tables."""
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": ORIGINAL,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.15,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
}
LONGER = {**SIZES, "max_position_embeddings": 4 * ORIGINAL, "original_max_position_embeddings": ORIGINAL}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEFAULT: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * place for place in range(8)],
    "long_factor": [3.0 + place for place in range(8)],
    "original_max_position_embeddings": ORIGINAL,
    "factor": 4.0,
}


def llama(rope: dict[str, Any], **sizes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes}, rope_parameters=dict(rope)))


def phi3() -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**LONGER, rope_parameters=dict(LONGROPE)))


def phimoe() -> PreTrainedModel:
    """Factors of its own beside the tables."""
    rope = {**LONGROPE, "short_mscale": 1.2, "long_mscale": 1.3}
    return PhimoeForCausalLM(PhimoeConfig(**LONGER, **EXPERTS, rope_parameters=rope))


def gemma3() -> PreTrainedModel:
    """A rope for each type of layers: one table changes, the other does not."""
    rope = {"full_attention": dict(DYNAMIC), "sliding_attention": dict(DEFAULT)}
    sizes = {**SIZES, "num_hidden_layers": 24, "head_dim": 16, "sliding_window": 8}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, rope_parameters=rope))


def modernbert_decoder() -> PreTrainedModel:
    """Two ropes that change, each in its own way."""
    rope = {"full_attention": dict(DYNAMIC), "sliding_attention": dict(LONGROPE)}
    sizes = {**SIZES, "num_hidden_layers": 18, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 8}
    return ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**sizes, rope_parameters=rope))


def gpt_oss() -> PreTrainedModel:
    """Tables of half the width."""
    sizes = {**SIZES, **EXPERTS, "head_dim": 16, "sliding_window": 8}
    return GptOssForCausalLM(GptOssConfig(**sizes, rope_parameters=dict(DYNAMIC)))


def llama4() -> PreTrainedModel:
    """One table of complex numbers."""
    sizes = {**SIZES, "num_hidden_layers": 24, "head_dim": 16, "intermediate_size_mlp": 64, "attention_chunk_size": 16}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
    return Llama4ForCausalLM(Llama4TextConfig(**sizes, **experts, rope_parameters=dict(DYNAMIC)))


def deepseek_v2() -> PreTrainedModel:
    """The same, for a part of each head."""
    heads = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    experts = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    sizes = {**SIZES, "num_key_value_heads": 4, "head_dim": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    return DeepseekV2ForCausalLM(DeepseekV2Config(**sizes, **heads, **experts, rope_parameters=dict(DYNAMIC)))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama (dynamic)": lambda: llama(DYNAMIC),
    "llama (longrope)": lambda: llama(LONGROPE),
    **{family.__name__: family for family in (phi3, phimoe, gemma3, modernbert_decoder, gpt_oss, llama4, deepseek_v2)},
}


def pair(model: PreTrainedModel, **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model compiled, and a copy of it that is not."""
    model.eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    own = copy.deepcopy(model)
    return glowplug.compile(model, **{"compiler": "eager", **options}), own


def equal(model: PreTrainedModel, own: PreTrainedModel, ids: Tensor, **kwargs: Any) -> None:
    with torch.no_grad():
        actual, expected = model(ids, **kwargs).logits, own(ids, **kwargs).logits
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


def text(model: PreTrainedModel, ids: Tensor, tokens: int) -> Tensor:
    made: Tensor = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_short_and_long_prompts_and_back(family: str) -> None:
    model, own = pair(FAMILIES[family]())
    if family == "modernbert_decoder" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("its own forward fails beyond the original length (transformers 5.17: UnboundLocalError)")
    for tokens in (5, 40, 12, 50, 45, 8):
        equal(model, own, prompt(2, tokens))
    beyond = prompt(1, ORIGINAL - 4)
    assert torch.equal(text(model, beyond, 9), text(own, beyond, 9))  # its tables change while it writes
    equal(model, own, prompt(1, 6))
    report = glowplug.report(model)
    assert report.fallbacks == []
    assert report.strategy == "stamped"


@pytest.mark.parametrize("family", ["llama (dynamic)", "phi3", "phimoe"])
def test_sequences_of_different_lengths(family: str) -> None:
    model, own = pair(FAMILIES[family]())
    ids = prompt(3, 40)
    for padded in (slice(None, 30), slice(10, None)):
        mask = torch.ones_like(ids)
        mask[0, padded] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            actual, expected = (m(ids, attention_mask=mask, position_ids=positions).logits for m in (model, own))
        seen = mask.bool()
        assert (actual - expected)[seen].norm() <= 1e-5 * expected[seen].norm()
    assert glowplug.report(model).fallbacks == []


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_the_comparison_leaves_no_mark(rope: dict[str, Any]) -> None:
    """The first answer is the one of a model that has seen nothing yet, though the program was compared before it."""
    rope = {**rope, "original_max_position_embeddings": 2} if rope is LONGROPE else rope
    model, own = pair(llama(rope, max_position_embeddings=2))
    for tokens in (3, 2, 4, 1):
        equal(model, own, prompt(1, tokens))
    assert glowplug.report(model).fallbacks == []


@pytest.mark.parametrize("used", [False, True])
def test_a_copy(used: bool) -> None:
    model, own = pair(llama(DYNAMIC))
    if used:
        for each in (model, own):
            text(each, prompt(1, 30), 6)
    twins = copy.deepcopy(model), copy.deepcopy(own)
    for tokens in (34, 7, 40):
        equal(*twins, prompt(1, tokens))
    equal(model, own, prompt(1, 9))
    assert glowplug.report(twins[0]).fallbacks == []


@pytest.mark.parametrize("family", ["llama (longrope)", "phi3", "phimoe"])
def test_two_threads(family: str) -> None:
    """One reads short prompts, and one long ones: tables are never those of the other's."""
    model, own = pair(FAMILIES[family]())
    prompts = prompt(1, 6), prompt(1, 40)
    with torch.no_grad():
        expected = [own(ids).logits for ids in prompts]
        model(prompts[0])
    wrong: list[float] = []

    def read(number: int) -> None:
        with torch.no_grad():
            for _ in range(30):
                logits = model(prompts[number]).logits
                error = ((logits - expected[number]).norm() / expected[number].norm()).item()
                if error > 1e-5:
                    wrong.append(error)

    threads = [threading.Thread(target=read, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert glowplug.report(model).fallbacks == []


def test_a_change_of_the_module_is_followed() -> None:
    model, own = pair(llama(DYNAMIC))
    equal(model, own, prompt(1, 9))
    for each in (model, own):
        each.model.rotary_emb.attention_scaling = 1.5
    equal(model, own, prompt(1, 9))
    for each in (model, own):
        each.model.rotary_emb.rope_type = "default"
    for tokens in (9, 40):
        equal(model, own, prompt(1, tokens))
    for each in (model, own):
        each.model.rotary_emb.register_buffer("inv_freq", each.model.rotary_emb.inv_freq[:4], persistent=False)
    with pytest.raises(RuntimeError):
        model(prompt(1, 9))  # as the model's own forward does


@pytest.mark.parametrize("how", ["module", "hook"])
def test_another_module_or_a_hook_is_noticed(how: str) -> None:
    model, own = pair(llama(DYNAMIC))
    equal(model, own, prompt(1, 9))
    for each in (model, own):
        if how == "module":
            each.model.rotary_emb = copy.deepcopy(each.model.rotary_emb)
            each.model.rotary_emb.attention_scaling = 2.0
        else:
            each.model.rotary_emb.register_forward_hook(lambda _m, _a, tables: tuple(2 * table for table in tables))
    equal(model, own, prompt(1, 9))


@pytest.mark.inductor
@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_compiled_and_started_again(rope: dict[str, Any], tmp_path: Path) -> None:
    """A model that was used, and holds other tables than a fresh one, finds the fresh one's program."""
    model, own = pair(llama(rope, num_hidden_layers=4), compiler="inductor", cache_dir=tmp_path)
    used = copy.deepcopy(own)
    text(used, prompt(1, 30), 6)
    for number, (compiled, plain) in enumerate(
        ((model, own), (glowplug.compile(copy.deepcopy(used), cache_dir=tmp_path), used))
    ):
        for tokens in (40, 7, 45):
            with torch.no_grad():
                actual, expected = compiled(prompt(1, tokens)).logits, plain(prompt(1, tokens)).logits
            assert (actual - expected).norm() <= 1e-4 * expected.norm()
        glowplug.settle(compiled)
        report = glowplug.report(compiled)
        assert report.fallbacks == []
        assert report.start == ("cold", "warm")[number]
