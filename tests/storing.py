"""A piece compiler whose pieces can be stored, and that needs no C++: it runs pieces as they are, and counts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

import glowplug
from glowplug.graph.pickled import graph_from_bytes, graph_to_bytes
from glowplug.report import Report


class PickleCompiler:
    """Stores pieces as the pickled Python of their graphs.

    Args:
        log: a file that gets a line for each piece compiled, by whichever process.
    """

    name = "pickle"

    def __init__(self, log: Path | None = None) -> None:
        self.log = log
        self.compiled = 0
        self.loaded = 0

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        """See `PieceCompiler.compile`."""
        self.compiled += 1
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{os.getpid()}\n")
        return piece.forward

    def environment(self, device: torch.device) -> str:
        """See `StoringCompiler.environment`."""
        return f"pickle {device.type} {torch.get_float32_matmul_precision()}"

    def forks(self, inputs: Sequence[Sequence[Any]], *, several: bool = False) -> bool:
        """See `StoringCompiler.forks`."""
        return False

    def compile_to_bytes(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> bytes:
        """See `StoringCompiler.compile_to_bytes`."""
        return self.compile_and_store(piece, inputs)[1]

    def compile_and_store(
        self, piece: fx.GraphModule, inputs: Sequence[Any]
    ) -> tuple[Callable[..., Sequence[Any]], bytes]:
        """See `StoringCompiler.compile_and_store`."""
        run = self.compile(piece, inputs)
        return run, graph_to_bytes(piece)

    def load(self, artifact: bytes) -> Callable[..., Sequence[Any]]:
        """See `StoringCompiler.load`."""
        self.loaded += 1
        return graph_from_bytes(artifact)


class Rounds(PickleCompiler):
    """Compiled pieces give a little more than uncompiled ones.

    Args:
        error: how much, relatively.
    """

    name = "rounds"

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        """See `PieceCompiler.compile`."""
        return self._rounding(super().compile(piece, inputs))

    def load(self, artifact: bytes) -> Callable[..., Sequence[Any]]:
        """See `StoringCompiler.load`."""
        return self._rounding(super().load(artifact))

    def _rounding(self, run: Callable[..., Sequence[Any]]) -> Callable[..., Sequence[Any]]:
        def rounding(*args: Any) -> Sequence[Any]:
            return tuple(value * (1 + self.error) if value.is_floating_point() else value for value in run(*args))

        return rounding


def stored_at(folder: Path) -> dict[str, Any]:
    """Options by which a model takes over what was traced for one like it."""
    return {"compiler": PickleCompiler(), "cache_dir": folder, "ends": "compiled", "inside": "eager"}


class StoringGraphs(PickleCompiler):
    """The same, in forks too.

    Args:
        fault: what compiling does in a fork: `"raises"`, `"dies"`, or nothing. In a fork of a fork, where ends of a
            build elsewhere are compiled: `"slow ends"`, `"ends die"`.
    """

    name = "storing graphs"

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.home = os.getpid()

    def forks(self, inputs: Sequence[Sequence[Any]], *, several: bool = False) -> bool:
        """Forks are safe: nothing is compiled."""
        return True

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        """The piece as it is."""
        if os.getpid() != self.home and self.fault == "raises":
            raise RuntimeError("a compiler that fails")
        if os.getpid() != self.home and self.fault == "dies":
            os._exit(3)
        if os.getpid() != self.home != os.getppid() and self.fault in ("slow ends", "ends die"):
            time.sleep(3)
            if self.fault == "ends die":
                os._exit(3)
        return super().compile(piece, inputs)


class Start:
    """One start of a model with a store: what it answered, and what was done for it."""

    def __init__(self, model: Any, store: Path | str | None, ids: torch.Tensor, **options: Any) -> None:
        self.compiler = options.pop("compiler", None) or PickleCompiler()
        glowplug.compile(model, compiler=self.compiler, cache_dir=store, ends="compiled", **options)
        with torch.no_grad():
            self.logits = model(ids, use_cache=False).logits
        self.report: Report = glowplug.report(model)

    @property
    def problems(self) -> str:
        """What the store noted."""
        assert self.report.store is not None
        return "\n".join(self.report.store.problems)


class Trap:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")
