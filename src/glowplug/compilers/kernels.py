"""Stores the compiled C++ kernels of a piece with its artifact, so that loading it needs no compiler.

Inductor's own artifacts contain only kernel sources, and a machine without them in its cache compiles them again.
Uses `AsyncCompile.cpp_pybinding` and `CppPythonBindingsCodeCache` (private; checked on torch 2.11 and 2.13). Without
them, artifacts contain no compiled kernels either.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from glowplug.runtime.forks import Scratch, in_forks

Sources = dict[str, tuple[tuple[str, ...], str]]
"""Digest of a kernel -> the types of its arguments, and its C++ source."""
KernelMaker = Callable[[Callable[[], Any], Sequence[str], str], Any]
"""`make(inductor, argument_types, source)` returns a kernel; `inductor()` is what Inductor would have returned."""
_maker: ContextVar[KernelMaker | None] = ContextVar("glowplug_kernels", default=None)


def _digest(argument_types: Sequence[str], source: str) -> str:
    return hashlib.sha256(f"{list(argument_types)!r}\n{source}".encode()).hexdigest()


@contextmanager
def _making_kernels(maker: KernelMaker) -> Iterator[None]:
    """Let `maker` provide the kernels that this thread requests from Inductor."""
    _patch_inductor()
    token = _maker.set(maker)
    try:
        yield
    finally:
        _maker.reset(token)


@functools.cache
def _patch_inductor() -> None:
    """Make Inductor use the current thread's kernel maker, if it has one.

    The patch is permanent, so that no thread or fork sees it half applied.
    """
    from torch._inductor.async_compile import AsyncCompile

    own = getattr(AsyncCompile, "cpp_pybinding", None)
    if own is None:  # pragma: no cover - depends on the torch installed
        return

    @functools.wraps(own)
    def cpp_pybinding(self: Any, argtypes: Sequence[str], source_code: str, *args: Any, **kwargs: Any) -> Any:
        inductor = functools.partial(own, self, argtypes, source_code, *args, **kwargs)
        maker = _maker.get()
        return inductor() if maker is None else maker(inductor, argtypes, source_code)

    AsyncCompile.cpp_pybinding = cpp_pybinding


@contextmanager
def noting_kernels() -> Iterator[Sources]:
    """Collect the kernels that this thread compiles."""
    sources: Sources = {}

    def note(inductor: Callable[[], Any], argument_types: Sequence[str], source: str) -> Any:
        sources[_digest(argument_types, source)] = (tuple(argument_types), source)
        return inductor()

    with _making_kernels(note):
        yield sources


@in_forks
def _forget_threads() -> None:
    """A fork lacks the threads of Inductor's pool, and would wait for them."""
    pool = getattr(getattr(sys.modules.get("torch._inductor.async_compile"), "AsyncCompile", None), "pool", None)
    if pool is not None:
        pool.cache_clear()


def read_kernels(sources: Sources) -> dict[str, bytes]:
    """Digest -> shared library, for kernels that this process has loaded."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    libraries = {}
    for digest, (argument_types, source) in sources.items():
        function: Any = CppPythonBindingsCodeCache.load_pybinding(list(argument_types), source)
        libraries[digest] = Path(function.__self__.__file__).read_bytes()
    return libraries


@contextmanager
def loading_kernels(libraries: Mapping[str, bytes]) -> Iterator[None]:
    """Let Inductor load these kernels instead of compiling them."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    with Scratch("kernels") as folder:

        def load(inductor: Callable[[], Any], argument_types: Sequence[str], source: str) -> Any:
            digest = _digest(argument_types, source)
            if digest not in libraries:
                return inductor()
            path = folder / f"{digest}.so"
            path.write_bytes(libraries[digest])
            # The library stays mapped after its file is deleted.
            library: Any = CppPythonBindingsCodeCache._load_library(str(path), f"glowplug_{digest}")
            return getattr(library, CppPythonBindingsCodeCache.entry_function)

        with _making_kernels(load):
            yield
