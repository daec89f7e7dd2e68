"""The protocols of piece compilers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx


@runtime_checkable
class PieceCompiler(Protocol):
    """Turns a piece into a callable.

    A compiler may have more methods. `problem(device_type)` says in one sentence why it can't compile for a device, or
    returns None. `warm_up(device_type)` is called before the trace, starts one-off work and returns at once;
    `cool_down()` is called when pieces are compiled, or the trace has failed, and ends what is left of it.
    `hand_over(work, *arguments)` lets a process that `warm_up` began do picklable work, `work(say, compiler,
    *arguments)`, and returns its job, or None if there is no such process; `can_hand_over` says whether there is one.
    `may_defer(inputs)` tells, before anything is compiled, whether forks may compile such pieces beside serving.
    `beside_forks(pieces)` is called while forks compile pieces. It begins jobs that compile what no piece contains.
    `drops_guards`, if true, says that what compilations assume of sizes is ignored.
    `warm_up_loading()` does one-off work for loading stored pieces: while the weights load, in a thread of its own, or
    while a helper compiles.
    """

    @property
    def name(self) -> str:
        """Name of the compiler in reports."""
        ...

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        """Compile a piece, inside the tracing context of its capture.

        Args:
            piece: the piece's graph; it returns a tuple of tensors.
            inputs: for each placeholder, in order, a fake tensor, symbolic size or handle.

        Returns:
            A callable that takes the corresponding real inputs and returns a tuple or list of tensors. It must be
            thread-safe, and support every size that the symbols stand for, not only those of the trace.
        """
        ...


@runtime_checkable
class StoringCompiler(PieceCompiler, Protocol):
    """A compiler whose compiled pieces can be stored, so another process can compile them."""

    def environment(self, device: torch.device) -> str:
        """Everything besides the piece that its compilation depends on: equal texts mean equal compiled pieces."""
        ...

    def forks(self, inputs: Sequence[Sequence[Any]], *, several: bool = False) -> bool:
        """Whether pieces with these inputs may be compiled in forks of this process. Called right before forking. With
        `several`, it may load what every fork would otherwise load by itself."""
        ...

    def compile_to_bytes(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> bytes:
        """Like `compile`, but returns the compiled piece in storable form."""
        ...

    def compile_and_store(
        self, piece: fx.GraphModule, inputs: Sequence[Any]
    ) -> tuple[Callable[..., Sequence[Any]], bytes]:
        """The callable, and the compiled piece in storable form."""
        ...

    def load(self, artifact: bytes) -> Callable[..., Sequence[Any]]:
        """The callable of a stored piece. Runs code from the artifact."""
        ...
