"""Spares a process that only loads compiled pieces the import of Inductor's compiler, half a second of a warm start.

The Python module of a compiled piece, and what executes it, import four names from modules that import all the rest
of Inductor: the table of ATen kernels, a function that rounds sizes, a class that tests put a hook on, and the function
by which the piece was decomposed. Meanwhile they come from stand-ins, which ask the real modules for whatever they
don't have. (Private; checked on torch 2.11 and 2.13.)
"""

from __future__ import annotations

import importlib
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._inductor

KERNELS = "torch._inductor.select_algorithm"
SIZES = "torch._inductor.codegen.memory_planning"
GRAPH = "torch._inductor.graph"
DECOMPOSITIONS = "torch._inductor.decomposition"

ATEN = {"mm": torch.mm, "addmm": torch.addmm, "bmm": torch.bmm, "baddbmm": torch.baddbmm}
"""Kernels of the table that are torch's own functions."""

_lock = threading.RLock()


class _Kernels:
    """Stands in for the table of ATen kernels."""

    def __getattr__(self, name: str) -> Any:
        found = ATEN.get(name) or getattr(_real(KERNELS).extern_kernels, name)
        setattr(self, name, found)
        return found


def _align(size: Any) -> Any:
    return _real(SIZES)._align(size)


def _select_decomp_table(*args: Any, **kwargs: Any) -> Any:
    return _real(DECOMPOSITIONS).select_decomp_table(*args, **kwargs)


class _GraphLowering:
    """Stands in for the class of graphs on their way through the compiler."""

    save_output_code = None


class _StandIn(types.ModuleType):
    """A module that gets from the real one whatever it lacks."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


def _real(name: str) -> Any:
    """The real module, imported now."""
    with _lock:
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]
        return importlib.import_module(name)


_LIGHT = (
    (KERNELS, "extern_kernels", _Kernels()),
    (SIZES, "_align", _align),
    (GRAPH, "GraphLowering", _GraphLowering),
    (DECOMPOSITIONS, "select_decomp_table", _select_decomp_table),
)


@contextmanager
def light_imports() -> Iterator[None]:
    """Inside, importing one of the modules gives its stand-in, unless the real one is there already."""
    made: list[str] = []
    with _lock:
        for name, attribute, value in _LIGHT:
            if name not in sys.modules:
                stand_in = _StandIn(name)
                setattr(stand_in, attribute, value)
                sys.modules[name] = stand_in
                made.append(name)
    try:
        yield
        if not hasattr(torch._inductor, "debug"):  # asked at each run of a piece; importing the real one replaces it
            stand_in = _StandIn(f"{torch._inductor.__name__}.debug")
            setattr(stand_in, "RECORD_GRAPH_EXECUTION", False)  # noqa: B010
            setattr(torch._inductor, "debug", stand_in)  # noqa: B010
    finally:
        with _lock:
            for name in made:
                if isinstance(sys.modules.get(name), _StandIn):
                    del sys.modules[name]
