"""The C++ kernels of a piece: noted while it compiles, kept with its artifact, loaded where no compiler needs to run.

Inductor's own artifacts hold a kernel's source, and compile it anew on a machine that has not seen it. Uses
`AsyncCompile.cpp_pybinding` and `CppPythonBindingsCodeCache` (private; checked on torch 2.11 and 2.13). Where they are
missing, artifacts hold no kernels, and loading one compiles them.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_lock = threading.RLock()

Sources = dict[str, tuple[tuple[str, ...], str]]
"""Digest of a kernel -> the types of its arguments, and its C++ source."""


def digest_of(argument_types: Sequence[str], source: str) -> str:
    """What a kernel is known by: SHA-256 of its source and the types of its arguments, in hex."""
    return hashlib.sha256(f"{list(argument_types)!r}\n{source}".encode()).hexdigest()


@contextmanager
def _in_place_of_inductor(stand_in: Callable[..., Any]) -> Iterator[None]:
    """Let `stand_in(own, compiler, argument_types, source)` make kernels; other threads wait."""
    from torch._inductor.async_compile import AsyncCompile

    own = getattr(AsyncCompile, "cpp_pybinding", None)
    if own is None:  # pragma: no cover - depends on the torch installed
        yield
        return

    def cpp_pybinding(self: Any, argtypes: Sequence[str], source_code: str, *args: Any, **kwargs: Any) -> Any:
        return stand_in(lambda: own(self, argtypes, source_code, *args, **kwargs), argtypes, source_code)

    with _lock:
        AsyncCompile.cpp_pybinding = cpp_pybinding
        try:
            yield
        finally:
            AsyncCompile.cpp_pybinding = own


@contextmanager
def noting_kernels() -> Iterator[Sources]:
    """Collects the kernels that this thread compiles inside."""
    found: Sources = {}
    thread = threading.get_ident()

    def stand_in(own: Callable[[], Any], argument_types: Sequence[str], source: str) -> Any:
        if threading.get_ident() == thread:
            found[digest_of(argument_types, source)] = (tuple(argument_types), source)
        return own()

    with _in_place_of_inductor(stand_in):
        yield found


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

    with tempfile.TemporaryDirectory(prefix="glowplug-kernels-") as folder:

        def stand_in(own: Callable[[], Any], argument_types: Sequence[str], source: str) -> Any:
            digest = digest_of(argument_types, source)
            if digest not in libraries:
                return own()
            path = Path(folder, f"{digest}.so")
            path.write_bytes(libraries[digest])
            # A loaded library stays mapped when its file is deleted.
            library: Any = CppPythonBindingsCodeCache._load_library(str(path), f"glowplug_{digest}")
            return getattr(library, CppPythonBindingsCodeCache.entry_function)

        with _in_place_of_inductor(stand_in):
            yield
