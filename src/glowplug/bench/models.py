"""Loads the model that a command names: a preset with random weights, a checkpoint that comes with glowplug, or a local
folder as transformers saved it.

Whatever is wrong with either raises a `UsageError` of one line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from glowplug.bench.presets import PRESETS, Width, build_model, check_depth
from glowplug.checkpoints import CHECKPOINTS, find_checkpoint
from glowplug.errors import UsageError
from glowplug.frontends.hf.builds import auto_class, read_config

_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Endings of the names of classes that write text."""


def resolve_device(device: str) -> torch.device:
    """The device of that name.

    Raises:
        UsageError: no such device here.
    """
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device must be cpu or cuda, not {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch sees no CUDA device here; use --device cpu")
    return torch.device(device)


def default_dtype(device: str) -> str:
    """The dtype in which models run by default: bfloat16 on a GPU, float32 on a CPU."""
    return "bfloat16" if device == "cuda" else "float32"


def check_dtype(dtype: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        UsageError: another dtype than float32, bfloat16 and float16.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"dtype must be float32, bfloat16 or float16; not {dtype!r}")
    torch_dtype: torch.dtype = getattr(torch, dtype)
    return torch_dtype


def load_model(
    name: str, *, depth: int | None = None, width: Width = "tiny", device: str = "cpu", dtype: str | None = None
) -> PreTrainedModel:
    """A model in eval mode, its weights without gradients.

    Args:
        name: a preset, a name in `CHECKPOINTS`, or a local folder with `config.json` and safetensors weights.
        depth: number of layers; None for the model's own. A folder's model can only be cut, not deepened.
        width: of a preset; a folder's model has its own.
        device: `"cpu"` or `"cuda"`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; None for `default_dtype(device)`.

    Raises:
        UsageError: no such preset, folder or device; a folder that holds no language model, or a broken one; a depth
            that the model can't have.
    """
    check_depth(depth)
    place = resolve_device(device)
    torch_dtype = check_dtype(dtype or default_dtype(device))
    if name in PRESETS:
        return build_model(name, depth=depth, width=width, device=place, dtype=torch_dtype)
    folder = find_folder(name)
    config = check_config(folder)
    if depth is not None:
        _cut(config, depth, folder)
    return _load_folder(folder, config, torch_dtype).to(place)


def true_depth(name: str) -> int:
    """The number of layers that a preset's or a folder's model has, without building it.

    Raises:
        UsageError: as `load_model`.
    """
    if name in PRESETS:
        return PRESETS[name].depth
    return int(check_config(find_folder(name)).get_text_config().num_hidden_layers)


def check_model(name: str, depths: Sequence[int] = ()) -> None:
    """Raise `UsageError` for what `load_model` would refuse, as far as can be seen without reading weights."""
    for depth in depths:
        check_depth(depth)
    if name not in PRESETS:
        folder = find_folder(name)
        config = check_config(folder)
        if depths:
            _cut(config, max(depths), folder)
        _check_weights(folder)


def find_folder(name: str) -> Path:
    """The local folder of that name, or else the checkpoint; it has a `config.json`.

    Raises:
        UsageError: no such folder, or nothing in it.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        if name in CHECKPOINTS:
            return find_checkpoint(name)
        known = f"presets: {', '.join(PRESETS)}; checkpoints: {', '.join(CHECKPOINTS)}"
        raise UsageError(f"no such preset or folder: {name!r}; {known}")
    if not folder.is_dir():
        raise UsageError(f"{name} is a file; a model is a folder with config.json and model.safetensors")
    if not (folder / "config.json").is_file():
        raise UsageError(f"{name} has no config.json, so it is not a model that transformers saved")
    return folder


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's message on one line, cut to `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def check_config(folder: Path) -> PreTrainedConfig:
    """The configuration of the language model in a folder.

    Raises:
        UsageError: it can't be read, or the model does not write text.
    """
    try:
        json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as exc:
        raise UsageError(f"{folder}/config.json can't be read: {one_line(exc)}") from exc
    config = read_config(folder)
    architectures = getattr(config, "architectures", None) or []
    known = config.model_type in {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    named = not architectures or any(a.endswith(_GENERATES) for a in architectures)
    if not known or not named or getattr(config, "is_encoder_decoder", False):
        what = ", ".join(architectures) or config.model_type
        raise UsageError(f"{folder} holds {what}, which is not a causal language model")
    return config


def _cut(config: PreTrainedConfig, depth: int, folder: Path) -> None:
    """Keep the first `depth` layers of a configuration."""
    text = config.get_text_config()
    own = text.num_hidden_layers
    if depth > own:
        raise UsageError(f"{folder} has {own} layers and trained weights for no more; --depth {depth} is too deep")
    for key, value in list(vars(text).items()):
        if key.endswith(("layer_types", "no_rope_layers")) and isinstance(value, list) and len(value) == own:
            setattr(text, key, value[:depth])
    text.num_hidden_layers = depth


def _check_weights(folder: Path) -> None:
    """Open each weights file, which reads its header and checks its size."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{folder} has no safetensors weights")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as exc:
            raise UsageError(f"{file} is not a whole safetensors file: {one_line(exc)}") from exc


def _load_folder(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    _check_weights(folder)
    auto = auto_class(config)
    try:
        model, info = auto.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as exc:  # safetensors, torch and transformers each have errors of their own for a broken file
        raise UsageError(f"the weights in {folder} can't be loaded: {one_line(exc)}") from exc
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise UsageError(f"the weights in {folder} lack {len(missing)} tensors of the model, such as {missing[0]}")
    model.requires_grad_(False)
    return model.eval()
