"""The eager piece compiler, for tests and to find out whether a fault is the compiler's or glowplug's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx


class EagerCompiler:
    """Runs a piece op by op, as the generated Python of its graph."""

    name = "eager"

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        """See `PieceCompiler.compile`."""
        return piece.forward
