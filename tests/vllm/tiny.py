"""Tiny models that vLLM serves, with weights so large that different prompts give different tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

_COMMON: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
_DENSE = {**_COMMON, "num_hidden_layers": 8, "intermediate_size": 128}

FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **_COMMON,
            "num_hidden_layers": 36,
            "intermediate_size": 128,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            **_COMMON,
            "num_hidden_layers": 8,
            "intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 32,
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            **_COMMON,
            "num_hidden_layers": 12,
            "first_k_dense_replace": 3,
            "intermediate_size": 128,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "use_qk_norm": True,
            "attention_bias": True,
            "num_nextn_predict_layers": 0,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **{name: value for name, value in _COMMON.items() if name != "head_dim"},
            "num_hidden_layers": 8,
            "first_k_dense_replace": 1,
            "intermediate_size": 128,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "num_key_value_heads": 4,
            "kv_lora_rank": 512,
            "q_lora_rank": 32,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "num_nextn_predict_layers": 0,
        },
    ),
    "mixtral": ("Mixtral", {**_DENSE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "llama": ("Llama", _DENSE),
    "qwen3": ("Qwen3", _DENSE),
    "gemma3": (
        "Gemma3",
        {**_DENSE, "num_hidden_layers": 18, "sliding_window": 32, "query_pre_attn_scalar": 32, "layer_types": None},
    ),
    "granite": ("Granite", {**_DENSE, "attention_multiplier": 0.2, "residual_multiplier": 0.5}),
}


def build(family: str, folder: Path, *, seed: int = 0, **options: Any) -> Path:
    """Write a model to a folder.

    Args:
        family: one of `FAMILIES`.
        folder: the folder.
        seed: of the weights.
        options: changes to the configuration.
    """
    name, settings = FAMILIES[family]
    text = "Text" if family.startswith("gemma3") else ""
    config: PreTrainedConfig = getattr(transformers, f"{name}{text}Config")(**{**settings, **options})
    config.dtype = "float32"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.dim() == 1:
                center = 1.0 if "norm" in path and not family.startswith("gemma") else 0.0
                weight.copy_(center + 0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return folder


def change(folder: Path, **options: Any) -> None:
    """Change the configuration of a model that was written."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
