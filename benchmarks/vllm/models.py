"""Configurations of released models at real width, for dummy weights: fewer experts where one GPU is too small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def config(name: str, depth: int | None) -> tuple[Any, str]:
    """The configuration of a preset and its architecture in vLLM."""
    from transformers import Glm4MoeConfig, GptOssConfig, Qwen3MoeConfig

    if name.startswith("gpt-oss"):
        layers, experts = (24, 32) if name == "gpt-oss-20b" else (36, 16)
        settings = {
            "num_hidden_layers": depth or layers,
            "num_local_experts": experts,
            "num_experts_per_tok": 4,
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
        }
        return GptOssConfig(**settings, **COMMON), "GptOssForCausalLM"
    if name == "glm-4.7":
        settings = {
            "num_hidden_layers": depth or 92,
            "first_k_dense_replace": 3,
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
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
        }
        return Glm4MoeConfig(**settings, **COMMON), "Glm4MoeForCausalLM"
    if name == "qwen3-30b-a3b":
        settings = {
            "num_hidden_layers": depth or 48,
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "max_position_embeddings": 4096,
        }
        return Qwen3MoeConfig(**settings, **COMMON), "Qwen3MoeForCausalLM"
    if name == "qwen3-moe-tiny":
        settings = {
            "num_hidden_layers": depth or 36,
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "moe_intermediate_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "max_position_embeddings": 512,
        }
        return Qwen3MoeConfig(**settings, **COMMON), "Qwen3MoeForCausalLM"
    raise SystemExit(
        f"unknown preset {name!r}; choose gpt-oss-20b, gpt-oss-120b, glm-4.7, qwen3-30b-a3b or qwen3-moe-tiny"
    )


def write_folder(name: str, depth: int | None, parent: Path) -> Path:
    """A folder that vLLM reads: a config.json, and no weights."""
    chosen, architecture = config(name, depth)
    chosen.architectures, chosen.dtype = [architecture], "bfloat16"
    folder = parent / f"{name}-{depth or 'full'}"
    chosen.save_pretrained(folder)
    return folder
