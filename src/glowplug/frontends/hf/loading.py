"""Loads a model while another process builds its program from the configuration."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from glowplug.background.job import Job
from glowplug.compilers import get_compiler, warm_up_loading
from glowplug.engine import attach
from glowplug.errors import UsageError
from glowplug.frontends.hf.builds import auto_class, begin_baking, read_dtype, with_store
from glowplug.frontends.hf.front import HfFrontEnd
from glowplug.options import Options
from glowplug.report import ElsewhereReport

_SETTINGS = ("attn_implementation", "experts_implementation")
"""Arguments of `from_pretrained` that change how the model computes."""
_HUB = ("cache_dir", "revision", "token", "local_files_only", "subfolder", "trust_remote_code", "force_download")


def load(path: str | os.PathLike[str], options: Options, settings: Mapping[str, Any]) -> PreTrainedModel:
    """See `glowplug.from_pretrained`; `settings` are transformers' own arguments."""
    name = os.fspath(path)
    config = settings.get("config")
    try:
        if config is None:
            config = AutoConfig.from_pretrained(name, **{key: settings[key] for key in _HUB if key in settings})
    except Exception as exc:  # transformers raises many classes
        raise UsageError(f"{name} has no configuration that transformers knows: {' '.join(str(exc).split())}") from exc
    options, scratch = with_store(options)
    job = _begin(name, config, options, settings)
    if job.outcome() is None:
        warm_up_loading(get_compiler(options.compiler))  # after the fork, which has only one thread
    start = time.perf_counter()
    model: PreTrainedModel = auto_class(config).from_pretrained(name, **settings)
    model.eval().requires_grad_(False)
    report = ElsewhereReport(load_seconds=round(time.perf_counter() - start, 3))
    start = time.perf_counter()
    outcome = job.outcome(math.inf)  # the job has a time limit of its own
    assert outcome is not None
    report.waited_seconds = round(time.perf_counter() - start, 3)
    report.seconds, report.reason = outcome.seconds, outcome.reason
    # The engine keeps the job alive, which may still be compiling deferred pieces.
    engine = attach(HfFrontEnd, model, dataclasses.replace(options, background=False), keeps=(scratch, job))
    engine.report.elsewhere = report
    engine.prepare()
    if outcome.reason is None and engine.report.start == "cold":
        report.reason = engine.compilation.why_unused(outcome.facts)
    return model


def _begin(name: str, config: PreTrainedConfig, options: Options, settings: Mapping[str, Any]) -> Job:
    """Begin to build the program from the configuration."""
    if settings.get("quantization_config") is not None or getattr(config, "quantization_config", None) is not None:
        return Job("the weights are quantized while they load")
    parallel = settings.get("tp_plan") is not None or settings.get("device_mesh") is not None
    if parallel or settings.get("distributed_config"):
        return Job("the weights are distributed while they load")
    device = _device(settings.get("device_map"))
    if isinstance(device, str):
        return Job(device)
    try:
        dtype = settings.get("dtype", "auto")
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
        dtype = dtype if isinstance(dtype, torch.dtype) else read_dtype(Path(name), config)
    except UsageError as exc:
        return Job(str(exc))
    implementations = {key: value for key, value in settings.items() if key in _SETTINGS and value is not None}
    return begin_baking(config, dtype, device, implementations, options)


def _device(device_map: Any) -> torch.device | str:
    """The single device that a device map names, or the reason why there is none."""
    if device_map is None:
        return torch.get_default_device()
    if isinstance(device_map, dict) and len(set(map(str, device_map.values()))) == 1:
        device_map = next(iter(device_map.values()))
    if isinstance(device_map, int) and torch.cuda.is_available():
        return torch.device("cuda", device_map)
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        return f"device_map={device_map!r} decides where weights go while they load"
