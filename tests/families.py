"""Tiny models of each family, on transformers' real classes, with random weights and the real mix of layers."""

from __future__ import annotations

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 256
_COMMON = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.15,
}


def gpt_oss(layers: int = 4) -> PreTrainedModel:
    """Alternating sliding and full attention, attention sinks."""
    return GptOssForCausalLM(
        GptOssConfig(
            **_COMMON,
            num_hidden_layers=layers,
            head_dim=16,
            intermediate_size=32,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )


def glm4_moe(layers: int = 4) -> PreTrainedModel:
    """Two dense layers first, then routed and shared experts."""
    return Glm4MoeForCausalLM(
        Glm4MoeConfig(
            **_COMMON,
            num_hidden_layers=layers,
            head_dim=16,
            intermediate_size=64,
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            first_k_dense_replace=2,
            n_group=1,
            topk_group=1,
        )
    )


def ernie4_5_vl_moe(layers: int = 3) -> PreTrainedModel:
    """Text and vision experts in every block of experts; only the text experts run on text."""
    text = {
        **_COMMON,
        "num_hidden_layers": layers,
        "intermediate_size": 64,
        "moe_intermediate_size": [32, 16],
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1),
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [3, 3, 2]},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
    config = Ernie4_5_VLMoeConfig(text_config=text, vision_config={**vision, "out_hidden_size": 64})
    return Ernie4_5_VLMoeForConditionalGeneration(config)


def qwen3_moe(layers: int = 4) -> PreTrainedModel:
    """Every other layer dense."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_COMMON,
            num_hidden_layers=layers,
            head_dim=16,
            intermediate_size=64,
            moe_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
            mlp_only_layers=[1],
        )
    )


def mixtral(layers: int = 3) -> PreTrainedModel:
    """All layers alike."""
    return MixtralForCausalLM(
        MixtralConfig(
            **_COMMON,
            num_hidden_layers=layers,
            intermediate_size=32,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    )


def deepseek_v3(layers: int = 4) -> PreTrainedModel:
    """Latent attention; first layer dense, then grouped routing and shared experts."""
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **{**_COMMON, "num_key_value_heads": 4},
            num_hidden_layers=layers,
            intermediate_size=64,
            moe_intermediate_size=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=16,
            q_lora_rank=24,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
        )
    )


def llama4(layers: int = 4) -> PreTrainedModel:
    """Every other layer experts; chunked attention, and every fourth layer full attention without rope."""
    return Llama4ForCausalLM(
        Llama4TextConfig(
            **_COMMON,
            num_hidden_layers=layers,
            head_dim=16,
            intermediate_size=32,
            intermediate_size_mlp=64,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            attention_chunk_size=16,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )


def qwen3(layers: int = 3) -> PreTrainedModel:
    """Dense."""
    return Qwen3ForCausalLM(
        Qwen3Config(**_COMMON, num_hidden_layers=layers, head_dim=16, intermediate_size=64, tie_word_embeddings=True)
    )


FAMILIES = {
    family.__name__: family
    for family in (gpt_oss, glm4_moe, ernie4_5_vl_moe, qwen3_moe, mixtral, deepseek_v3, llama4, qwen3)
}
"""Name of the family -> function that builds a tiny model of it."""


def build(family: str, seed: int = 0, **kwargs: int) -> PreTrainedModel:
    """A tiny model of a family, in eval mode, with seeded weights."""
    torch.manual_seed(seed)
    model = FAMILIES[family](**kwargs).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))  # no zero biases, no equal norms
    model.generation_config.eos_token_id = None
    return model


def prompt(batch: int = 1, tokens: int = 12, seed: int = 1) -> torch.Tensor:
    """Seeded token ids, `[batch, tokens]`, without the pad token."""
    return torch.randint(2, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))
