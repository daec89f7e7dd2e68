"""Versions, devices, and the environment variables that change what glowplug does."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import warnings
from collections.abc import Iterator

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # private; checked on torch 2.11 and 2.13

from glowplug.background.job import TIMEOUT_VARIABLE
from glowplug.bench.results.environment import describe_environment
from glowplug.cli.doctor.finding import Finding
from glowplug.frontends.vllm.plugin import VARIABLE as VLLM_VARIABLE
from glowplug.store.envelope import KEY_FILE_VARIABLE, KEY_VARIABLE
from glowplug.store.opening import CACHE_VARIABLE
from glowplug.store.remote import hide_password

_OLDEST_TRANSFORMERS = (5, 17)
_OLDEST_CAPABILITY = (7, 0)
"""The oldest GPUs for which Triton compiles."""
_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_VARIABLES = {
    CACHE_VARIABLE: "the artifact store",
    KEY_VARIABLE: "signs stored artifacts",
    KEY_FILE_VARIABLE: "signs stored artifacts",
    TIMEOUT_VARIABLE: "seconds until a build in another process is given up",
    VLLM_VARIABLE: "0 switches the plug-in for vLLM off",
    "VLLM_PLUGINS": "the plug-ins that vLLM loads",
    "VLLM_DISABLE_COMPILE_CACHE": "1 keeps vLLM and the plug-in from storing anything",
    "TORCHDYNAMO_DISABLE": "1 turns torch.compile off",
    "TORCH_COMPILE_DISABLE": "1 turns torch.compile off",
    _FOLDER: "Inductor's cache folder",
    "TORCHINDUCTOR_COMPILE_THREADS": "1 makes pieces compile one after another",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1 turns Inductor's caches off",
    "TORCH_INDUCTOR_INSTALL_GXX": "Inductor installs a C++ compiler",
    "TORCH_LOGS": "what torch logs",
    "TORCH_COMPILE_DEBUG": "1 makes torch write what it compiles, which takes time",
    "CXX": "the C++ compiler",
    "TMPDIR": "the folder for temporary files",
    "OMP_NUM_THREADS": "threads of a CPU kernel; stored pieces are compiled for a number of threads",
    "CUDA_VISIBLE_DEVICES": "the GPUs that torch sees",
}


def version(*packages: str) -> str | None:
    """The version of the first of these packages that is installed, without importing it; None if none is."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: (5, 17) for `"5.17.0.dev0"`."""
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())


def versions() -> Iterator[Finding]:
    """The versions of Python and of the packages that glowplug works with. torch is new enough, or glowplug could not
    be imported."""
    from glowplug import __version__

    yield Finding("versions", "glowplug", __version__)
    yield Finding("versions", "python", platform.python_version())
    yield Finding("versions", "torch", torch.__version__)
    yield _transformers(version("transformers"))
    triton = version("triton", "pytorch-triton", "triton-windows")
    if triton is None and torch.cuda.is_available():
        yield Finding(
            "versions", "triton", "not installed, and Inductor needs it on a GPU", "problem", "pip install triton"
        )
    else:
        yield Finding("versions", "triton", triton or "not installed; only GPUs need it")


def _transformers(installed: str | None) -> Finding:
    oldest = ".".join(map(str, _OLDEST_TRANSFORMERS))
    install = f"pip install 'transformers>={oldest}'"
    if installed is None:
        text = "not installed: glowplug compiles plain modules only, and most commands are missing"
        return Finding("versions", "transformers", text, "note", install)
    if numbers(installed) < _OLDEST_TRANSFORMERS:
        text = f"{installed}, which is older than {oldest}: transformers models can't be compiled"
        return Finding("versions", "transformers", text, "problem", install)
    return Finding("versions", "transformers", installed)


def devices() -> Iterator[Finding]:
    """The processor and the GPUs."""
    with warnings.catch_warnings(record=True) as raised:  # torch warns of a broken driver
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts = describe_environment()
    memory = f", {facts['ram_gb']} GB" if facts["ram_gb"] is not None else ""
    threads = torch.get_num_threads()
    text = f"{facts['cpu']}, {facts['cores']} cores{memory}, {threads} thread{'s' * (threads > 1)} a kernel"
    yield Finding("devices", "cpu", text)
    for index in range(count):
        yield _gpu(index)
    if count == 0 and torch.version.cuda is not None:
        text = f"torch is built for CUDA {torch.version.cuda}, but sees no GPU"
        reason = " ".join(str(raised[0].message).split()) if raised else ""
        text += f": {reason}" if reason else ""
        yield Finding("devices", "gpu", text, "note", "to use a GPU, see whether nvidia-smi lists one")
    elif count == 0:
        yield Finding("devices", "gpu", "none: this torch is built for CPUs")


def _gpu(index: int) -> Finding:
    name = f"cuda:{index}"
    try:
        properties = torch.cuda.get_device_properties(index)
    except RuntimeError as exc:
        return Finding("devices", name, f"can't be asked: {' '.join(str(exc).split())}", "problem")
    capability = (properties.major, properties.minor)
    text = f"{properties.name}, {properties.total_memory / 1e9:.1f} GB, capability {capability[0]}.{capability[1]}"
    if torch.version.hip is None and capability < _OLDEST_CAPABILITY:
        return Finding("devices", name, f"{text}, which is too old for Triton: models on it run eager", "warning")
    return Finding("devices", name, text)


def environment() -> Iterator[Finding]:
    """The variables that are set and change what glowplug does. Secrets and passwords are not shown."""
    for name, meaning in _VARIABLES.items():
        value = os.environ.get(name)
        if not value or (name == _FOLDER and value == default_cache_dir()):  # torch sets that one itself
            continue
        shown = "(set)" if name == KEY_VARIABLE else hide_password(" ".join(value.split()))
        if name == TIMEOUT_VARIABLE and not value.strip().isdecimal():
            text = f"{shown} is not a whole number of seconds and is ignored"
            yield Finding("environment", name, text, "warning", f"set {name} to a number such as 600, or unset it")
        else:
            yield Finding("environment", name, f"{shown} ({meaning})")
