"""Configurations of released models at real width, for dummy weights: fewer experts where one GPU is too small."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glowplug.bench.presets import Width, build_config, get_preset


@dataclass(frozen=True)
class _Chosen:
    """A preset of `glowplug bench` with other values: the experts that fit on one GPU, above all."""

    preset: str
    depth: int | None = None
    width: Width = "full"
    values: dict[str, Any] = field(default_factory=dict)


CHOSEN = {
    "glm-4.7": _Chosen("glm-4.7"),
    "qwen3-30b-a3b": _Chosen("qwen3-30b-a3b", values={"num_experts": 128}),
    "gpt-oss-120b": _Chosen("gpt-oss-120b", values={"num_local_experts": 16}),
    "gpt-oss-20b": _Chosen("gpt-oss-20b", values={"num_local_experts": 32}),
    # vLLM's attention on a CPU takes no heads of 16.
    "qwen3-moe-tiny": _Chosen(
        "qwen3-30b-a3b", 36, "tiny", {"vocab_size": 512, "head_dim": 32, "moe_intermediate_size": 32, "num_experts": 8}
    ),
}


def write_folder(name: str, depth: int | None, parent: Path) -> Path:
    """A folder that vLLM reads: a config.json, and no weights."""
    if name not in CHOSEN:
        raise SystemExit(f"unknown preset {name!r}; choose of {', '.join(CHOSEN)}")
    chosen = CHOSEN[name]
    config = build_config(chosen.preset, depth=depth or chosen.depth, width=chosen.width)
    values = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **chosen.values}
    if config.rope_parameters["rope_type"] == "default":
        values["max_position_embeddings"] = 4096
    for key, value in values.items():
        setattr(config, key, value)
    config.architectures, config.dtype = [get_preset(chosen.preset).model_class], "bfloat16"
    folder = parent / f"{name}-{depth or 'full'}"
    config.save_pretrained(folder)
    return folder
