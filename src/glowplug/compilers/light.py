"""Loads compiled pieces without importing what Inductor needs only to compile, which takes longer than all else that a
warm start does.

Inductor's wrappers import its whole compiler for the names of a few functions of torch, and so does the cache by which
it loads them. Uses `FxGraphCache.cache_hit_post_compile` (private; checked on torch 2.11 and 2.13); without it, pieces
load as Inductor loads them.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch

_loads: ContextVar[bool] = ContextVar("glowplug_loads", default=False)

extern_kernels = SimpleNamespace(mm=torch.mm, bmm=torch.bmm, addmm=torch.addmm, baddbmm=torch.baddbmm)
"""What Inductor's wrappers call by this name: the functions of torch for matrices."""
_EXTERN = "from torch._inductor.select_algorithm import extern_kernels\n"
_MAYBE_UNUSED = {
    "MultiKernelCall": "from torch._inductor.codegen.multi_kernel import MultiKernelCall\n",
    "align": "from torch._inductor.codegen.memory_planning import _align as align\n",
}


@contextmanager
def loading_lightly() -> Iterator[None]:
    """Let this thread load pieces in this way."""
    _patch_inductor()
    token = _loads.set(True)
    try:
        yield
    finally:
        _loads.reset(token)


def light_source(source: str) -> str:
    """A wrapper's source without the imports that it does not need, or needs only for functions of torch."""
    for name, line in _MAYBE_UNUSED.items():
        if len(re.findall(rf"\b{name}\b", source)) == 1:
            source = source.replace(line, "")
    uses = re.findall(r"\bextern_kernels\b(?:\.(\w+))?", source.replace(_EXTERN, ""))
    if all(name in vars(extern_kernels) for name in uses):
        source = source.replace(_EXTERN, f"from {__name__} import extern_kernels\n" if uses else "")
    return source


def lighten(artifact: bytes) -> bytes:
    """A serialised piece without the functions that only compiling it called, which would be imported with it."""
    if b"get_decomp_fn" not in artifact:
        return artifact
    try:
        bundle = pickle.loads(artifact)
        del bundle[0].compiled_fw.result.fx_kwargs["get_decomp_fn"]
        return pickle.dumps(bundle)
    except Exception:  # torch serialises it in another way
        return artifact


@functools.cache
def _patch_inductor() -> None:
    """Let Inductor's cache load without its compiler, where a thread asks for that. The patch is permanent, so that no
    thread or fork sees it half applied."""
    from torch._inductor.codecache import FxGraphCache
    from torch._inductor.output_code import CompiledFxGraph
    from torch._inductor.triton_bundler import TritonBundler

    class LightGraph(CompiledFxGraph):
        """A compiled piece; it notes nothing for Inductor's debugger."""

        def __call__(self, inputs: Any) -> Any:
            if not torch.autograd.profiler._is_profiler_enabled:
                return self.current_callable(inputs)
            with torch.autograd.profiler.record_function(f"## Call CompiledFxGraph {self.cache_key} ##"):
                return self.current_callable(inputs)

    own: Any = getattr(FxGraphCache, "cache_hit_post_compile", None)
    if own is None:  # pragma: no cover - depends on the torch installed
        return

    @functools.wraps(own)
    def cache_hit_post_compile(graph: Any, info: Any, constants: Any) -> tuple[Any, Any]:
        if not _loads.get():
            hit: tuple[Any, Any] = own(graph, info, constants)
            return hit
        if graph._triton_bundle:
            TritonBundler.read_and_emit(graph._triton_bundle)
        light = light_source(graph.source_code)
        if light != graph.source_code:
            digest = hashlib.sha256(light.encode()).hexdigest()[:16]  # names the file that it is loaded from
            graph.source_code, graph.cache_key = light, f"{graph.cache_key}_{digest}"
        graph.after_deserialization(constants)
        if type(graph) is CompiledFxGraph:
            graph.__class__ = LightGraph
        return graph, info

    FxGraphCache.cache_hit_post_compile = staticmethod(cache_hit_post_compile)
