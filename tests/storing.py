"""A piece compiler whose pieces can be stored, and that compiles nothing: an artifact is a graph's text."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from glowplug.graph.text import graph_to_text, text_to_function


class StoringGraphs:
    """Keeps count of what this process, and not its forks, compiled and loaded.

    Args:
        fault: what compiling does in a fork: `"raises"`, `"dies"`, or nothing.
    """

    name = "storing graphs"

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.home = os.getpid()
        self.compiled = 0
        self.loaded = 0

    def environment(self, device: torch.device) -> str:
        """All pieces are for any device."""
        return "storing graphs"

    def forks(self, inputs: Sequence[Sequence[Any]]) -> bool:
        """Forks are safe: nothing is compiled."""
        return True

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        """The piece as it is."""
        if os.getpid() != self.home and self.fault == "raises":
            raise RuntimeError("a compiler that fails")
        if os.getpid() != self.home and self.fault == "dies":
            os._exit(3)
        self.compiled += 1
        return piece.forward

    def compile_to_bytes(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> bytes:
        """The piece's text."""
        return self.compile_and_store(piece, inputs)[1]

    def compile_and_store(
        self, piece: fx.GraphModule, inputs: Sequence[Any]
    ) -> tuple[Callable[..., Sequence[Any]], bytes]:
        """Both."""
        run = self.compile(piece, inputs)
        return run, graph_to_text(piece).encode()

    def load(self, artifact: bytes) -> Callable[..., Sequence[Any]]:
        """A piece from its text."""
        self.loaded += 1
        return text_to_function(artifact.decode())
