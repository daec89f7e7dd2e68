"""Every name of vLLM that glowplug uses; most are private. Checked on vLLM 0.24.0 (CUDA) and 0.32.0 (CPU)."""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace
from typing import Any

from glowplug.errors import GlowplugError

CHECKED = ("0.24.0", "0.32.0")
"""The versions of vLLM that glowplug was checked on."""

_NAMES = (
    "vllm.envs",
    "vllm.__version__",
    "vllm.compilation.backends.wrap_with_cudagraph_if_needed",
    "vllm.compilation.caching.aot_compile_hash_factors",
    "vllm.compilation.monitor.monitor_profiling_run",
    "vllm.compilation.monitor.monitor_torch_compile",
    "vllm.compilation.piecewise_backend.PiecewiseBackend",
    "vllm.compilation.wrapper.TorchCompileWithNoGuardsWrapper",
    "vllm.config.CompilationMode",
    "vllm.config.VllmConfig",
    "vllm.config.set_current_vllm_config",
    "vllm.config.compilation.CompilationConfig",
    "vllm.config.compilation.DynamicShapesType",
    "vllm.distributed.parallel_state.get_tp_group",
    "vllm.env_override._apply_constrain_to_fx_strides_patch",
    "vllm.forward_context.get_forward_context",
    "vllm.forward_context.is_forward_context_available",
    "vllm.utils.torch_utils.LayerName",
)


class UnsupportedVllmError(GlowplugError):
    """This vLLM lacks a name that glowplug needs; the message says which."""


@functools.cache
def vllm() -> Any:
    """The names above, as attributes by their last part; and `shared`, the classes of what all layers share.

    Raises:
        UnsupportedVllmError: this vLLM lacks one.
    """
    found: dict[str, Any] = {}
    for name in _NAMES:
        place, _, leaf = name.rpartition(".")
        try:
            found[leaf] = getattr(importlib.import_module(place), leaf)
        except (ImportError, AttributeError) as exc:
            version = found.get("__version__", "of an unknown version")
            raise UnsupportedVllmError(
                f"vLLM {version} has no {name}, which glowplug needs; it was checked on vLLM {' and '.join(CHECKED)}"
            ) from exc
    found["version"] = found.pop("__version__")
    found["shared"] = (found["VllmConfig"], found["CompilationConfig"])
    return SimpleNamespace(**found)
