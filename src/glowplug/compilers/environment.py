"""Everything besides its graph that a compiled piece depends on: versions, device, processor, options and switches.

Reads Inductor's configuration (private; checked on torch 2.11 and 2.13).
"""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

FORM = 7
"""Version of the stored form; a new one makes everything stored before unreachable."""
_VOLATILE = ("compile_threads", "worker_", "trace.", "verbose", "debug", "log", "remote_cache", "cache_dir", "_cache")
"""Parts of the names of Inductor options that do not affect the compiled piece."""


def describe_environment(device: torch.device, options: Mapping[str, Any], threads: int) -> str:
    """The environment, as text, of pieces compiled for a device with these Inductor options and number of threads."""
    facts: dict[str, Any] = {
        "form": FORM,
        "torch": torch.__version__,
        "built": torch.version.git_version,
        "python": str(sys.implementation.cache_tag),
        "machine": f"{sys.platform} {platform.machine()}",
        "device": device.type,
        "options": sorted((name, repr(value)) for name, value in options.items()),
        "inductor": _inductor_options(),
        "default dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "processor": _processor(),
        "threads": threads if device.type == "cpu" else 0,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda or torch.version.hip,
            "triton": _triton(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return json.dumps(facts, sort_keys=True)


def _processor() -> str:
    """The instruction sets that kernels may use. Needed on a GPU as well, whose pieces may contain CPU kernels."""
    features = [torch.backends.cpu.get_cpu_capability()]
    for name in ("_is_avx512_bf16_supported", "_is_vnni_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        test = getattr(torch.cpu, name, None)
        features += [name] if test is not None and test() else []
    return " ".join([*features, _processor_flags()])


@functools.cache
def _processor_flags() -> str:
    """A digest of the processor's features, or of its name if the system does not list them.

    Kernels are compiled for exactly this processor (`-march=native`). An instruction that another one lacks would kill
    the process.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    flags = {" ".join(sorted(line.split())) for line in lines if line.lower().startswith(("flags", "features"))}
    text = repr(sorted(flags)) if flags else platform.processor()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _inductor_options() -> dict[str, str]:
    values = _read_inductor()
    return {name: repr(values[name]) for name in sorted(values) if not any(part in name for part in _VOLATILE)}


def _read_inductor() -> dict[str, Any]:
    from torch._inductor import config

    save: Any = getattr(config, "save_config_portable", None)
    return dict(save(ignore_private_configs=True)) if save is not None else {}


def read_switches() -> bytes:
    """The process-wide switches that the environment depends on, pickled for `set_switches` in another process."""
    inductor = {}
    for name, value in _read_inductor().items():
        with suppress(Exception):  # a user's function may not pickle
            inductor[name] = pickle.dumps(value)
    tf32: dict[str, bool] = {}
    with suppress(RuntimeError):  # torch raises if its newer switches were used as well
        tf32 = {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32}
    switches = {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "tf32": tf32,
        "threads": torch.get_num_threads(),
        "inductor": inductor,
    }
    return pickle.dumps(switches)


def set_switches(content: bytes) -> None:
    """Set the switches of this process to those that `read_switches` returned in another."""
    from torch._inductor import config

    switches = pickle.loads(content)
    torch.set_default_dtype(switches["default dtype"])
    if switches["default device"] != torch.get_default_device():
        torch.set_default_device(switches["default device"])
    torch.use_deterministic_algorithms(switches["deterministic"], warn_only=switches["deterministic warns"])
    torch.set_float32_matmul_precision(switches["matmul precision"])
    if switches["tf32"]:
        torch.backends.cuda.matmul.allow_tf32 = switches["tf32"]["matmul"]
        torch.backends.cudnn.allow_tf32 = switches["tf32"]["cudnn"]
    torch.set_num_threads(switches["threads"])
    now = _read_inductor()
    for name, pickled in switches["inductor"].items():
        with suppress(Exception):  # a value that can't be set here shows up as a difference
            value = pickle.loads(pickled)
            if name not in now or now[name] != value:
                setattr(config, name, value)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The facts behind an address that differ between two processes, as `"NAME (THERE there, HERE here)"`."""
    first, second = _flat(there), _flat(here)
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    return [f"{name} ({_short(first.get(name))} there, {_short(second.get(name))} here)" for name in names]


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Facts by name, with those of the environment and of Inductor's configuration unpacked."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if name == "environment" and isinstance(value, str):
            with suppress(ValueError):
                value = json.loads(value)
        if isinstance(value, dict):
            flat |= _flat(value, "inductor." if name == "inductor" else prefix)
        else:
            flat[prefix + name] = value
    return flat


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64 and value.isalnum():  # a digest
        return value[:12]
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)
