"""The presets: the depth, the pattern of layers and the sizes of well-known models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One well-known model.

    Attributes:
        name: what `glowplug bench` calls it.
        depth: how many layers it has.
        experts: how many routed experts a layer of it has; 0 for a dense model.
        top_k: how many of them a token takes.
        model_class: its class in transformers.
        config_class: the class of its (text) configuration.
        pattern: depth -> the arguments that set the kind of each layer.
        full: arguments with the real sizes, and as many experts as one GPU of 140 GB holds in bfloat16: all, or few.
        tiny: arguments that differ from the common ones of width tiny.
    """

    name: str
    depth: int
    experts: int
    top_k: int
    model_class: str
    config_class: str
    pattern: Callable[[int], dict[str, Any]]
    full: dict[str, Any]
    tiny: dict[str, Any] = field(default_factory=dict)


def _alternating(depth: int) -> dict[str, Any]:
    return {"layer_types": [("sliding_attention", "full_attention")[i % 2] for i in range(depth)]}


def _first_dense(count: int) -> Callable[[int], dict[str, Any]]:
    return lambda depth: {"first_k_dense_replace": min(count, depth)}


def _mlp_types(depth: int) -> dict[str, Any]:
    return {"mlp_layer_types": ["dense", *["sparse"] * (depth - 1)]}


def _maverick(depth: int) -> dict[str, Any]:
    """Every other layer has experts; every fourth has full attention and no rotary embedding, the rest chunks."""
    full = [(i + 1) % 4 == 0 for i in range(depth)]
    return {
        "moe_layers": list(range(1, depth, 2)),
        "no_rope_layers": [int(not f) for f in full],
        "layer_types": ["full_attention" if f else "chunked_attention" for f in full],
    }


def _all_full(depth: int) -> dict[str, Any]:
    return {"layer_types": ["full_attention"] * depth}


def _uniform(depth: int) -> dict[str, Any]:
    return {}


def _gpt_oss(name: str, depth: int, experts: int, *, full_experts: int) -> Preset:
    return Preset(
        name,
        depth,
        experts,
        4,
        "GptOssForCausalLM",
        "GptOssConfig",
        _alternating,
        full={
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": full_experts,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
        },
        tiny={"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128},
    )


def _qwen3_moe(
    name: str,
    depth: int,
    *,
    hidden: int,
    intermediate: int,
    heads: int,
    experts_intermediate: int,
    full_experts: int,
) -> Preset:
    return Preset(
        name,
        depth,
        128,
        8,
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _uniform,
        full={
            "vocab_size": 151936,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_attention_heads": heads,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "moe_intermediate_size": experts_intermediate,
            "num_experts": full_experts,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        tiny={"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
    )


_ALL = (
    _gpt_oss("gpt-oss-120b", 36, 128, full_experts=8),
    _gpt_oss("gpt-oss-20b", 24, 32, full_experts=32),
    Preset(
        "glm-4.7",
        92,
        160,
        8,
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        _first_dense(3),
        full={
            "vocab_size": 151552,
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "moe_intermediate_size": 1536,
            "n_routed_experts": 8,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "attention_bias": True,
            "use_qk_norm": True,
            "num_nextn_predict_layers": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
        },
        tiny={"moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2},
    ),
    Preset(
        "ernie-4.5-vl-28b-a3b",
        28,
        64,
        6,
        "Ernie4_5_VLMoeForConditionalGeneration",
        "Ernie4_5_VLMoeTextConfig",
        _mlp_types,
        full={
            "vocab_size": 103424,
            "hidden_size": 2560,
            "intermediate_size": 12288,
            "num_attention_heads": 20,
            "num_key_value_heads": 4,
            "moe_intermediate_size": [1536, 512],
            "moe_num_experts": 8,
            "moe_k": 6,
            "moe_num_shared_experts": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [22, 22, 20]},
        },
        tiny={
            "moe_intermediate_size": [64, 32],
            "moe_num_experts": 4,
            "moe_k": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [3, 3, 2]},
        },
    ),
    _qwen3_moe(
        "qwen3-235b-a22b",
        94,
        hidden=4096,
        intermediate=12288,
        heads=64,
        experts_intermediate=1536,
        full_experts=8,
    ),
    _qwen3_moe(
        "qwen3-30b-a3b",
        48,
        hidden=2048,
        intermediate=6144,
        heads=32,
        experts_intermediate=768,
        full_experts=128,
    ),
    Preset(
        "deepseek-v3",
        61,
        256,
        8,
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _first_dense(3),
        full={
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "moe_intermediate_size": 2048,
            "n_shared_experts": 1,
            # Groups of two, the least that group-limited routing allows; a token takes every expert of half of them.
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        tiny={
            "num_key_value_heads": 4,
            "head_dim": 8,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "moe_intermediate_size": 64,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    Preset(
        "llama-4-maverick",
        48,
        128,
        1,
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        _maverick,
        full={
            "vocab_size": 202048,
            "hidden_size": 5120,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "use_qk_norm": False,
            "attention_chunk_size": 8192,
        },
        tiny={"intermediate_size_mlp": 128, "num_local_experts": 4},
    ),
    Preset(
        "mixtral-8x22b",
        56,
        8,
        2,
        "MixtralForCausalLM",
        "MixtralConfig",
        _uniform,
        full={
            "vocab_size": 32000,
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_local_experts": 3,  # 111 GB in bfloat16; four would be 145
            "num_experts_per_tok": 2,
            "max_position_embeddings": 65536,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        tiny={"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    Preset(
        "qwen3-dense",  # Qwen3-1.7B
        28,
        0,
        0,
        "Qwen3ForCausalLM",
        "Qwen3Config",
        _all_full,
        full={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}
