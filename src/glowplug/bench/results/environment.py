"""The machine and the versions behind a measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def describe_environment(device: str = "cpu") -> dict[str, Any]:
    """Machine, versions, date and command line, as plain data. Only for `"cuda"` the GPU is touched and described."""
    cuda = device == "cuda" and torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "ram_gb": _ram_gb(),
        "os": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpu_memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "glowplug": _version("glowplug"),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["glowplug", *map(_without_folder, sys.argv[1:])]),
    }


def machine_line(environment: dict[str, Any]) -> str:
    """The machine in a few words, for titles."""
    cpu = f"{environment['cpu']}, {environment['cores']} cores"
    place = environment["gpu"] or cpu
    return f"{place}, torch {environment['torch']}"


def _without_folder(argument: str) -> str:
    """Reduce an absolute path to its name, as its folder means nothing on another machine."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _ram_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
