"""Every MoE family of transformers that writes text, and dense ones with unusual attention, at tiny widths: the
default config with smaller sizes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from glowplug.errors import UsageError

VOCAB = 256

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.15,
    "sliding_window": 8,
    "sliding_window_size": 8,
    # experts
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "zero_expert_num": 2,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 64,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "moe_latent_size": 32,
    "intermediate_size_mlp": 64,
    "dense_intermediate_size": 64,
    # latent attention and indexers
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 16,
    # linear attention, state space, convolution
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_dt_rank": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_chunk_size": 16,
    "ssm_state_size": 16,
    "chunk_size": 16,
}
"""Values of config attributes, for configs that have them."""

_DEEPEST = 200


def _every(period: int, one: str, others: str) -> list[str]:
    return [one if (layer + 1) % period == 0 else others for layer in range(_DEEPEST)]


def _spelled(pattern: str) -> list[str]:
    """Layer types of Nemotron-H, from the letters of its checkpoints' configs."""
    types = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
    return [types[letter] for letter in pattern * (_DEEPEST // len(pattern))]


_LAYERS: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"layer_types": _every(6, "attention", "mamba")},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": _every(3, "full_attention", "conv")},
    "longcat_flash": {"head_dim": 8},  # that of the rotated part
    "minimax": {"sliding_window": None},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "nemotron_h": {"layers_block_type": _spelled("MEMEM*E")},
    "gemma4_text": {"hidden_size_per_layer_input": 0},  # as in its checkpoints with experts
}
"""Further attributes of a family; lists have an entry for each layer and are cut to the depth."""

_DENSE: dict[str, dict[str, Any]] = {
    "bloom": {"n_head": 4},
    "codegen": {"n_head": 4, "n_embd": 64, "n_positions": 512, "rotary_dim": 8},
    "falcon": {"alibi": True},
    "gpt_neo": {"num_heads": 4, "window_size": 8, "attention_layers": _every(2, "local", "global")},
    "mpt": {"n_heads": 4, "d_model": 64, "max_seq_len": 512},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64},
}
"""Families without experts, and the sizes for which their configs have other names. They use no attention interface
(alibi, masks of their own) or derive positions from the mask."""

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
"""Names of the number of layers in configs."""

_PERIODS = {"flint": 4}
"""Period of the layer pattern of families whose last layer is special at any depth. With them, the transition to the
last layer depends on the depth."""

_YARN = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0}
_LONGROPE = {"rope_type": "longrope"}
_ROPES: dict[str, dict[str, Any]] = {
    "deepseek_v2 (yarn)": {**_YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707},
    "deepseek_v3 (yarn)": {**_YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "gemma3_text (linear)": {"rope_type": "linear", "factor": 8.0},
    "hunyuan_v1_moe (dynamic)": {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0},
    "llama (dynamic)": {"rope_type": "dynamic", "factor": 2.0},
    "llama (llama3)": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "llama4_text (llama3)": {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0},
    "minicpm3 (longrope)": _LONGROPE,
    "phi3 (longrope)": _LONGROPE,
    "phimoe (longrope)": {**_LONGROPE, "short_mscale": 1.243163121016122, "long_mscale": 1.243163121016122},
    "qwen3_moe (yarn)": {**_YARN, "factor": 4.0},
}
"""The rope of released checkpoints, where it differs from that of the family's default config."""
_ORIGINAL = 10
"""Original context length of these tiny models; the sweep's text is longer."""


def released_ropes() -> list[str]:
    """Rows of the sweep for families with the rope of their released checkpoints, such as `"phi3 (longrope)"`."""
    return [name for name in _ROPES if _model_type(name) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


def _model_type(row: str) -> str:
    return row.partition(" (")[0]


def depth_as_released(row: str, depth: int) -> int:
    """The least depth from `depth` on at which a family's last layers follow each other as at its released depth."""
    model_type = _model_type(row)
    if model_type not in _PERIODS:
        return depth
    return depth + (CONFIG_MAPPING[model_type]().num_hidden_layers - depth) % _PERIODS[model_type]


def families() -> dict[str, str]:
    """Model type -> class name of every family whose config mentions experts, and of some dense ones.

    A family with a text-only variant is left out in favour of that.
    """
    classes = {}
    for model_type, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if model_type.endswith("_assistant"):
            continue
        try:
            names = _names(CONFIG_MAPPING[model_type])
        except (KeyError, ImportError, ValueError):
            continue
        if any("expert" in name for name in names) and isinstance(class_name, str):
            classes[model_type] = class_name
    classes = {model_type: name for model_type, name in classes.items() if f"{model_type}_text" not in classes}
    return classes | {model_type: str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]) for model_type in _DENSE}


def _names(cls: type[PreTrainedConfig]) -> set[str]:
    """Attributes of a config class and of its text part."""
    text = _text_part(cls)
    return _own_names(cls) | (_names(text) if text is not None else set())


def _own_names(cls: type[PreTrainedConfig]) -> set[str]:
    return set(inspect.signature(cls).parameters) | set(getattr(cls, "__dataclass_fields__", ()))


def _text_part(cls: type[PreTrainedConfig]) -> type[PreTrainedConfig] | None:
    """The class of a config's text part; None if the config itself is one for text."""
    text: type[PreTrainedConfig] | None = getattr(cls, "sub_configs", {}).get("text_config")
    return text if text is not cls else None


def build_family(row: str, depth: int) -> PreTrainedModel:
    """A tiny model of a family with seeded random weights, in eval mode.

    Args:
        row: a model type, such as `"qwen3_next"`, or one of `released_ropes()`.
        depth: layers.

    Raises:
        UsageError: no such family.
        Exception: its config does not take the small sizes.
    """
    known = families()
    rope = _ROPES.get(row)
    model_type = row if rope is None else _model_type(row)
    if rope is None and model_type not in known:
        raise UsageError(f"no MoE family {model_type!r} in this transformers; there are {', '.join(known)}")
    shape = _LAYERS.get(model_type) or _DENSE.get(model_type, {})
    config = _tiny_config(CONFIG_MAPPING[model_type], depth, shape)
    if rope is not None:
        config = _tiny_config(CONFIG_MAPPING[model_type], depth, {**shape, **_rope(config.get_text_config(), rope)})
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])(config)
    model.eval().requires_grad_(False)
    return model


def _rope(config: Any, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that give a tiny config a released checkpoint's rope.

    `config` is the config without it; `rope` lacks lengths and the factors of each frequency.
    """
    own, rope_type = config.rope_parameters, rope["rope_type"]
    by_layer = "rope_type" not in own  # then the layers with full attention get it
    settings = {**(own["full_attention"] if by_layer else own), **rope}
    sizes: dict[str, Any] = {"max_position_embeddings": _ORIGINAL}
    if rope_type != "dynamic":
        settings["original_max_position_embeddings"] = _ORIGINAL
        sizes["max_position_embeddings"] = 4 * _ORIGINAL
    if rope_type == "longrope":
        width = getattr(config, "qk_rope_head_dim", None) or getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        count = int(width * settings.get("partial_rotary_factor", 1.0)) // 2
        settings["short_factor"] = [1.0 + 0.1 * place for place in range(count)]
        settings["long_factor"] = [2.0 + place for place in range(count)]
        sizes["original_max_position_embeddings"] = _ORIGINAL
    return {**sizes, "rope_parameters": {**own, "full_attention": settings} if by_layer else settings}


def _tiny_config(cls: type[PreTrainedConfig], depth: int, layers: Mapping[str, Any]) -> PreTrainedConfig:
    text = _text_part(cls)
    if text is not None:
        return cls(text_config=_tiny_config(text, depth, layers).to_dict())
    names = _own_names(cls)
    aliases = set(getattr(cls, "attribute_map", {}))
    sizes = {name: value for name, value in _SIZES.items() if name in names and name not in aliases}
    sizes[next((name for name in _DEPTHS if name in names), "num_layers")] = depth
    if "kv_lora_rank" in names:  # latent attention has as many keys as queries
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if "is_moe" in names:
        sizes["is_moe"] = True
    if "enable_moe_block" in names:
        sizes["enable_moe_block"] = True
    sizes |= {name: value[:depth] if isinstance(value, list) else value for name, value in layers.items()}
    return cls(**sizes)
