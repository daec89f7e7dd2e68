"""Builds presets: configurations at a depth and a width, and models with random weights."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import transformers

from glowplug.bench.presets.catalogue import PRESETS, Preset
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
            as many experts a layer as one GPU holds: all of gpt-oss-20b's and qwen3-30b-a3b's, else 3 to 8.
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
