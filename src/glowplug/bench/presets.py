"""Well-known models as configurations with random weights: the true depth and pattern of layers, as these make a cold
start slow; at either of two widths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import transformers

from glowplug.errors import UsageError

Width = Literal["tiny", "full"]

_TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_TINY_VISION: dict[str, Any] = {"depth": 1, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128}


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
        full: arguments with the real sizes, and few enough experts for one GPU of 140 GB.
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


def _gpt_oss(name: str, depth: int, experts: int) -> Preset:
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
            "num_local_experts": 8,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
        },
        tiny={"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128},
    )


def _qwen3_moe(
    name: str, depth: int, *, hidden: int, intermediate: int, heads: int, experts_intermediate: int
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
            "num_experts": 8,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        tiny={"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
    )


_ALL = (
    _gpt_oss("gpt-oss-120b", 36, 128),
    _gpt_oss("gpt-oss-20b", 24, 32),
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
    _qwen3_moe("qwen3-235b-a22b", 94, hidden=4096, intermediate=12288, heads=64, experts_intermediate=1536),
    _qwen3_moe("qwen3-30b-a3b", 48, hidden=2048, intermediate=6144, heads=32, experts_intermediate=768),
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


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        UsageError: there is none; the message lists them.
    """
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}; presets: {', '.join(PRESETS)}")
    return PRESETS[name]


def check_depth(depth: int | None) -> None:
    """Raise `UsageError` for a depth below 1."""
    if depth is not None and depth < 1:
        raise UsageError(f"depth must be at least 1, not {depth}")


_EXPERTS = {"num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"}
"""Names of the number of routed experts a layer in configurations."""


def build_config(
    preset: str,
    *,
    depth: int | None = None,
    width: Width = "tiny",
    dtype: torch.dtype | None = None,
    all_experts: bool = False,
) -> transformers.PreTrainedConfig:
    """The configuration of a preset.

    Args:
        preset: its name.
        depth: number of layers; None for the model's own. Any depth keeps the model's layer pattern.
        width: `"tiny"`: hidden size 64, 4 heads, 4 experts, 256 tokens. `"full"`: the real sizes and vocabulary, with
            3 to 8 experts a layer.
        dtype: recorded in the configuration; None leaves it open.
        all_experts: as many experts a layer as the released model has.

    Raises:
        UsageError: unknown preset or width, or a depth below 1.
    """
    model = get_preset(preset)
    check_depth(depth)
    if width not in get_args(Width):
        raise UsageError(f"width must be one of {', '.join(get_args(Width))}; not {width!r}")
    layers = model.depth if depth is None else depth
    sizes = {**model.full, **_TINY, **model.tiny} if width == "tiny" else dict(model.full)
    if all_experts:
        sizes |= dict.fromkeys(_EXPERTS & sizes.keys(), model.experts)
    # Keeps activations, and so logits, at a scale of one at any width. At the usual 0.02 a narrow model's layers would
    # add almost nothing to its embeddings, and a wrong layer would hardly show.
    sizes["initializer_range"] = sizes["hidden_size"] ** -0.5
    sizes |= {"num_hidden_layers": layers, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = getattr(transformers, model.config_class)(**sizes, **model.pattern(layers), dtype=dtype)
    if model.config_class == "Ernie4_5_VLMoeTextConfig":
        return _with_vision(config, width)
    return config


def _with_vision(text: transformers.PreTrainedConfig, width: Width) -> transformers.PreTrainedConfig:
    """The whole configuration around a text configuration. The vision tower has one block, as text never enters it."""
    vision = dict(_TINY_VISION) if width == "tiny" else {"depth": 1}
    return transformers.Ernie4_5_VLMoeConfig(text_config=text.to_dict(), vision_config=vision, dtype=text.dtype)


def build_model(
    preset: str,
    *,
    depth: int | None = None,
    width: Width = "tiny",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    all_experts: bool = False,
) -> transformers.PreTrainedModel:
    """A preset's model in eval mode, with random weights created on the device itself.

    Args:
        preset, depth, width, all_experts: see `build_config`.
        device: where the weights are created.
        dtype: dtype of the weights.
        seed: seed of the weights; the caller's random state does not change.

    Raises:
        UsageError: as `build_config`.
    """
    config = build_config(preset, depth=depth, width=width, dtype=dtype, all_experts=all_experts)
    model_class = getattr(transformers, get_preset(preset).model_class)
    place = torch.device(device)
    cuda = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), place:
        torch.manual_seed(seed)
        model = model_class._from_config(config, dtype=dtype)
    model.requires_grad_(False)
    model.generation_config.eos_token_id = None
    return model.eval()
