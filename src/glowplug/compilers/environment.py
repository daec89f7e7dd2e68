"""What a compiled piece depends on besides itself: versions, the device, the processor, options and switches.

Reads Inductor's configuration (private; checked on torch 2.11 and 2.13).
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import sys
from collections.abc import Mapping
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


def _inductor_options() -> str:
    """A digest of Inductor's own configuration."""
    from torch._inductor import config

    save: Any = getattr(config, "save_config_portable", None)
    values = save(ignore_private_configs=True) if save is not None else {}
    kept = sorted((k, repr(v)) for k, v in values.items() if not any(part in k for part in _VOLATILE))
    return hashlib.sha256(repr(kept).encode()).hexdigest()


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)
