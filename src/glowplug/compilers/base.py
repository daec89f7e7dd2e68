"""The protocol that a piece compiler fulfils."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx


@runtime_checkable
class PieceCompiler(Protocol):
    """Turns one piece into a callable. A compiler may also have two methods: `warm_up(device_type)`, called before the
    trace begins, which starts one-off work and returns at once; and `warm_up_loading()`, called in a thread of its own
    while weights are loaded, before stored pieces are."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        """Compile one piece, inside the tracing context of its capture.

        Args:
            piece: the piece's graph; it returns a tuple of tensors.
            inputs: one fake tensor, symbolic size or handle a placeholder, in order.

        Returns:
            A callable of the same inputs, real ones, that returns a tuple or list of tensors. It must serve every
            size that the symbols stand for, not only those of the trace, and be safe to call from several threads.
        """
        ...


@runtime_checkable
class StoringCompiler(PieceCompiler, Protocol):
    """A compiler whose compiled pieces can be stored, and so be made by another process."""

    def environment(self, device: torch.device) -> str:
        """Everything besides a piece that its compilation depends on, as text: equal texts, equal compiled pieces."""
        ...

    def forks(self, inputs: Sequence[Sequence[Any]], *, several: bool = False) -> bool:
        """Whether pieces of these inputs may be compiled in forks of this process; called right before. With `several`,
        it pays to load here what each fork would have to."""
        ...

    def compile_to_bytes(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> bytes:
        """As `compile`, but the compiled piece is returned in a form that can be stored."""
        ...

    def compile_and_store(
        self, piece: fx.GraphModule, inputs: Sequence[Any]
    ) -> tuple[Callable[..., Sequence[Any]], bytes]:
        """Both: the callable, and the compiled piece in a form that can be stored."""
        ...

    def load(self, artifact: bytes) -> Callable[..., Sequence[Any]]:
        """The callable of a stored piece. Runs code that the artifact holds."""
        ...
