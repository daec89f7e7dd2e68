"""What a compiled piece depends on besides itself: versions, the device, the processor, options and switches.

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

FORM = 3
"""Of what is stored; a change of it makes all that was stored before unreachable."""
_VOLATILE = ("compile_threads", "worker_", "trace.", "verbose", "debug", "log", "remote_cache", "cache_dir", "_cache")
"""Inductor options that change how a piece is compiled and not what comes of it, by parts of their names."""


def describe_environment(device: torch.device, options: Mapping[str, Any], threads: int) -> str:
    """The environment of pieces for a device, compiled with some Inductor options for a number of threads, as text."""
    facts: dict[str, Any] = {
        "form": FORM,
        "torch": torch.__version__,
        "built": torch.version.git_version,
        "python": f"{sys.implementation.cache_tag}",
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
    """The instruction sets that kernels may use; a GPU piece may hold CPU kernels, too."""
    found = [torch.backends.cpu.get_cpu_capability()]
    for name in ("_is_avx512_bf16_supported", "_is_vnni_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        test = getattr(torch.cpu, name, None)
        found += [name] if test is not None and test() else []
    return " ".join([*found, _processor_flags()])


@functools.cache
def _processor_flags() -> str:
    """A digest of all that the processor can do: kernels are compiled for exactly that (`-march=native`), and one that
    uses an instruction which another processor lacks ends the process. Where the system does not say: its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    wanted = {" ".join(sorted(line.split())) for line in lines if line.lower().startswith(("flags", "features"))}
    told = repr(sorted(wanted)) if wanted else platform.processor()
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _inductor_options() -> dict[str, str]:
    """Inductor's own configuration."""
    values = _read_inductor()
    return {name: repr(values[name]) for name in sorted(values) if not any(part in name for part in _VOLATILE)}


def _read_inductor() -> dict[str, Any]:
    from torch._inductor import config

    save: Any = getattr(config, "save_config_portable", None)
    return dict(save(ignore_private_configs=True)) if save is not None else {}


def read_switches() -> bytes:
    """The process-wide switches that the environment of pieces depends on, for another process; see `set_switches`."""
    inductor = {}
    for name, value in _read_inductor().items():
        with suppress(Exception):  # a function of somebody's own has no form
            inductor[name] = pickle.dumps(value)
    tf32: dict[str, bool] = {}
    with suppress(RuntimeError):  # torch refuses where its newer switches were used, too
        tf32 = {
            "matmul": torch.backends.cuda.matmul.allow_tf32,
            "cudnn": torch.backends.cudnn.allow_tf32,
        }
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
    """Set the switches of this process as they were in the one that read them."""
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
        with suppress(Exception):  # what can't be set here is found to differ
            value = pickle.loads(pickled)
            if name not in now or now[name] != value:
                setattr(config, name, value)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What two processes have otherwise, of all that an address is made of: `"NAME (THERE there, HERE here)"`."""
    first, second = _flat(there), _flat(here)
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    return [f"{name} ({_short(first.get(name))} there, {_short(second.get(name))} here)" for name in names]


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Facts by name, those of an environment (see `describe_environment`) and of Inductor's configuration, too."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        if name == "environment" and isinstance(value, str):
            with suppress(ValueError):
                value = json.loads(value)
        if isinstance(value, dict):
            found |= _flat(value, "inductor." if name == "inductor" else prefix)
        else:
            found[prefix + name] = value
    return found


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64 and value.isalnum():  # of a digest the beginning tells them apart
        return value[:12]
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)
