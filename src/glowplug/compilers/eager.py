"""The eager piece compiler: runs a piece op by op, uncompiled. For tests, and to tell a compiler's fault from ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx


class EagerCompiler:
    """Runs the piece's graph as generated Python."""

    name = "eager"

    def warm_up(self, device_type: str) -> None:
        """Nothing to prepare."""

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        """See `PieceCompiler.compile`."""
        return piece.forward
