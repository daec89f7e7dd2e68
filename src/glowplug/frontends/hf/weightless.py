"""Models without weights, and without memory for them: from a configuration alone, to be traced and compiled."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from glowplug.errors import UsageError
from glowplug.graph.capture import drop_memory


def auto_class(config: PreTrainedConfig) -> Any:
    """The auto class that loads a model that writes text."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    image_text = config.model_type not in known and config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if image_text else AutoModelForCausalLM


def weightless_model(
    config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device, **settings: Any
) -> PreTrainedModel:
    """The model of a configuration, in eval mode, its weights without memory: it can be traced and not run.

    Args:
        config: its configuration.
        dtype: of its weights.
        device: where its weights would be.
        settings: as for `from_config`, such as `attn_implementation`.
    """
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype, **settings)
    drop_memory(model, device)
    return model.eval()


def read_dtype(folder: Path, config: PreTrainedConfig) -> torch.dtype:
    """The dtype that `from_pretrained` gives a folder's model: the configuration's, or else its first weights'.

    Raises:
        UsageError: neither says.
    """
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(found, str):
        found = getattr(torch, found, None)
    if isinstance(found, torch.dtype):
        return found
    for file in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(Exception), safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (no mapping)
                dtype = weights.get_slice(name).get_dtype()
                if dtype in _DTYPES:
                    return _DTYPES[dtype]
    raise UsageError(f"neither {folder}/config.json nor weights say which dtype the model has; give a dtype")


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration in a local folder.

    Raises:
        UsageError: there is none that transformers knows.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as exc:  # errors of many classes
        text = " ".join(str(exc).split())[:300]
        raise UsageError(f"{folder}/config.json is not a configuration that transformers knows: {text}") from exc
