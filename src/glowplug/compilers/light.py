"""Loads compiled pieces without importing what Inductor needs only to compile, which takes longer than all else that a
warm start does.

Inductor's wrappers import its whole compiler for the names of a few functions of torch, and so does the cache by which
it loads them. A wrapper with Triton kernels also starts processes that could compile them, and hashes torch to look for
those that are stored with it. Uses `FxGraphCache.cache_hit_post_compile`, `AsyncCompile.use_process_pool` and
`torch_key` (private; checked on torch 2.11 and 2.13); without them, pieces load as Inductor loads them. The tuner of
kernels, in the first run of a piece, also imports the compiler for one function: `CachingAutotuner.maybe_clone_args`.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any

import torch


@dataclass
class _Loading:
    """A piece that is being loaded.

    Attributes:
        torch_key: Inductor's hash of torch in the process that compiled it.
        is_whole: whether all of its Triton kernels are stored with it.
    """

    torch_key: bytes
    is_whole: bool = False


_loading: ContextVar[_Loading | None] = ContextVar("glowplug_loading", default=None)

extern_kernels = SimpleNamespace(mm=torch.mm, bmm=torch.bmm, addmm=torch.addmm, baddbmm=torch.baddbmm)
"""What Inductor's wrappers call by this name: the functions of torch for matrices."""
_EXTERN = "from torch._inductor.select_algorithm import extern_kernels\n"
_KERNEL = "= async_compile.triton("
_MAYBE_UNUSED = {
    "MultiKernelCall": "from torch._inductor.codegen.multi_kernel import MultiKernelCall\n",
    "align": "from torch._inductor.codegen.memory_planning import _align as align\n",
}


@contextmanager
def loading_lightly(torch_key: bytes) -> Iterator[None]:
    """Let this thread load a piece in this way.

    Args:
        torch_key: what `read_torch_key` returned where the piece was compiled. Kernels that are stored with the piece
            are named by it.
    """
    _patch_inductor()
    token = _loading.set(_Loading(torch_key))
    try:
        yield
    finally:
        _loading.reset(token)


def read_torch_key() -> bytes:
    """Inductor's hash of torch."""
    from torch._inductor.codecache import torch_key

    return torch_key()


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
        loading = _loading.get()
        if loading is None:
            hit: tuple[Any, Any] = own(graph, info, constants)
            return hit
        if graph._triton_bundle:
            TritonBundler.read_and_emit(graph._triton_bundle)
            stored = len(graph._triton_bundle.static_autotuners)
            loading.is_whole = stored > 0 and stored >= graph.source_code.count(_KERNEL)
        light = light_source(graph.source_code)
        if light != graph.source_code:
            digest = hashlib.sha256(light.encode()).hexdigest()[:16]  # names the file that it is loaded from
            graph.source_code, graph.cache_key = light, f"{graph.cache_key}_{digest}"
        graph.after_deserialization(constants)
        if type(graph) is CompiledFxGraph:
            graph.__class__ = LightGraph
        return graph, info

    FxGraphCache.cache_hit_post_compile = staticmethod(cache_hit_post_compile)
    _patch_kernels()
    _patch_tuner()


def _patch_kernels() -> None:
    """The same where wrappers look for their Triton kernels."""
    from torch._inductor import async_compile, codecache

    own_pool: Any = getattr(async_compile.AsyncCompile, "use_process_pool", None)
    own_key: Any = getattr(codecache, "torch_key", None)
    if own_pool is None or own_key is None:  # pragma: no cover - depends on the torch installed
        return

    @functools.wraps(own_pool.__func__)
    def use_process_pool(cls: type) -> bool:
        loading = _loading.get()
        return bool(own_pool()) if loading is None or not loading.is_whole else False

    @functools.wraps(own_key)
    def torch_key() -> bytes:
        loading = _loading.get()
        return bytes(own_key()) if loading is None else loading.torch_key

    async_compile.AsyncCompile.use_process_pool = classmethod(use_process_pool)
    codecache.torch_key = async_compile.torch_key = torch_key


def _patch_tuner() -> None:
    """Let the tuner of a kernel copy the arguments that the kernel writes to without Inductor's compiler."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._inductor.utils import clone_preserve_strides

    own: Any = getattr(CachingAutotuner, "maybe_clone_args", None)
    if own is None:  # pragma: no cover - depends on the torch installed
        return

    @functools.wraps(own)
    def maybe_clone_args(tuner: Any, exclude: Any, *args: Any, **kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
        def passed(name: str, value: Any) -> Any:
            is_written = name in tuner.mutated_arg_names and name not in exclude
            return clone_preserve_strides(value) if is_written else value

        names = chain(tuner.fn.arg_names, repeat(""))
        return list(map(passed, names, args)), {name: passed(name, value) for name, value in kwargs.items()}

    CachingAutotuner.maybe_clone_args = maybe_clone_args
