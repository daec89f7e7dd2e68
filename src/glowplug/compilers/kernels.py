"""The C++ kernels of a piece: noted while it compiles, kept with its artifact, loaded where no compiler needs to run.

Inductor's own artifacts hold a kernel's source, and compile it anew on a machine that has not seen it. Uses
`AsyncCompile.cpp_pybinding` and `CppPythonBindingsCodeCache` (private; checked on torch 2.11 and 2.13). Where they are
missing, artifacts hold no kernels, and loading one compiles them.
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


def digest_of(argument_types: Sequence[str], source: str) -> str:
    """What a kernel is known by: SHA-256 of its source and the types of its arguments, in hex."""
    return hashlib.sha256(f"{list(argument_types)!r}\n{source}".encode()).hexdigest()


StandIn = Callable[[Callable[[], Any], Sequence[str], str], Any]
"""Makes a kernel: `stand_in(own, argument_types, source)`; `own()` is what Inductor would have done."""

_stand_in: ContextVar[StandIn | None] = ContextVar("glowplug_kernels", default=None)


@contextmanager
def _in_place_of_inductor(stand_in: StandIn) -> Iterator[None]:
    """Let `stand_in` make the kernels that this thread asks for."""
    _ask_stand_ins()
    token = _stand_in.set(stand_in)
    try:
        yield
    finally:
        _stand_in.reset(token)


@functools.cache
def _ask_stand_ins() -> None:
    """From now on Inductor asks the stand-in of a thread for kernels, where it has one. For good, so that no thread,
    and no fork, sees it come and go."""
    from torch._inductor.async_compile import AsyncCompile

    own = getattr(AsyncCompile, "cpp_pybinding", None)
    if own is None:  # pragma: no cover - depends on the torch installed
        return

    @functools.wraps(own)
    def cpp_pybinding(self: Any, argtypes: Sequence[str], source_code: str, *args: Any, **kwargs: Any) -> Any:
        make = functools.partial(own, self, argtypes, source_code, *args, **kwargs)
        stand_in = _stand_in.get()
        return make() if stand_in is None else stand_in(make, argtypes, source_code)

    AsyncCompile.cpp_pybinding = cpp_pybinding


@contextmanager
def noting_kernels() -> Iterator[Sources]:
    """Collects the kernels that this thread compiles inside."""
    found: Sources = {}

    def stand_in(own: Callable[[], Any], argument_types: Sequence[str], source: str) -> Any:
        found[digest_of(argument_types, source)] = (tuple(argument_types), source)
        return own()

    with _in_place_of_inductor(stand_in):
        yield found


@in_forks
def _forget_threads() -> None:
    """Inductor's pool of threads is not there in a fork; it would wait for it."""
    pool = getattr(getattr(sys.modules.get("torch._inductor.async_compile"), "AsyncCompile", None), "pool", None)
    if pool is not None:
        pool.cache_clear()


def read_kernels(sources: Sources) -> dict[str, bytes]:
    """The shared libraries of kernels that this process has loaded, by digest."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    libraries = {}
    for digest, (argument_types, source) in sources.items():
        function: Any = CppPythonBindingsCodeCache.load_pybinding(list(argument_types), source)
        libraries[digest] = Path(function.__self__.__file__).read_bytes()
    return libraries


@contextmanager
def serving_kernels(libraries: Mapping[str, bytes]) -> Iterator[None]:
    """Inside, Inductor gets these kernels instead of compiling them."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    with Scratch("kernels") as folder:

        def stand_in(own: Callable[[], Any], argument_types: Sequence[str], source: str) -> Any:
            digest = digest_of(argument_types, source)
            if digest not in libraries:
                return own()
            path = folder / f"{digest}.so"
            path.write_bytes(libraries[digest])
            # A loaded library stays mapped when its file is deleted.
            library: Any = CppPythonBindingsCodeCache._load_library(str(path), f"glowplug_{digest}")
            return getattr(library, CppPythonBindingsCodeCache.entry_function)

        with _in_place_of_inductor(stand_in):
            yield
