"""Records the layer ops inside an uncompiled piece, and replays their outputs inside the compiled piece.

An op may amplify a rounding difference: if a router finds two experts nearly tied, the last bit of its input chooses.
So when a compiled piece is compared with its own graph, both get the same outputs of the ops inside, and the inputs of
these ops are compared, too. Each op runs once, writes once, and, with `identity="ordered"`, takes its layer once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glowplug.errors import LayerLookupError


@dataclass(frozen=True)
class _Call:
    """A recorded call of an op."""

    args: Any
    output: Any
    written: dict[int, Any]


class Tape:
    """The calls of ops inside a piece, recorded once and replayed any number of times."""

    def __init__(self) -> None:
        self._calls: dict[str, list[_Call]] = {}
        self._replay: dict[str, list[Any]] | None = None

    @property
    def given(self) -> dict[str, list[Any]]:
        """The inputs of each recorded call, by op."""
        return {op: [call.args for call in calls] for op, calls in self._calls.items()}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Run ops and record their calls."""
        self._replay = None
        with self._in_use():
            yield

    @contextmanager
    def replaying(self) -> Iterator[dict[str, list[Any]]]:
        """Return recorded outputs instead of running ops. Yields the inputs of the replayed calls, by op."""
        self._replay = {}
        with self._in_use():
            yield self._replay

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def call(
        self,
        op: str,
        identity: Any,
        find_layer: Callable[[], nn.Module],
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        writes: set[int],
    ) -> Any:
        """Run or replay one call of an op: of `fn` on a layer and `args`, some of which it `writes` to."""
        name = f"{op} of {getattr(identity, 'name', identity)}"
        inputs = copy_of(args)
        if self._replay is None:
            output = fn(find_layer(), *args)
            written = {index: copy_of(args[index]) for index in writes}
            self._calls.setdefault(name, []).append(_Call(inputs, copy_of(output), written))
            return output
        replayed = self._replay.setdefault(name, [])
        replayed.append(inputs)
        if len(replayed) > len(self._calls.get(name, ())):
            raise LayerLookupError(f"{op} is called more often than its calls were recorded")
        recorded = self._calls[name][len(replayed) - 1]
        for index, value in recorded.written.items():
            if isinstance(value, Tensor):
                args[index].copy_(value)
        return copy_of(recorded.output)


_current: ContextVar[Tape | None] = ContextVar("glowplug_tape", default=None)


def current_tape() -> Tape | None:
    """The tape in use in this thread or task, or None."""
    return _current.get()


def copy_of(value: Any) -> Any:
    """A copy of a tensor, or of the tensors in a list or tuple, with the same strides: compiled code relies on them."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(copy_of, value))
    if not isinstance(value, Tensor):
        return value
    if type(value) is not Tensor or value.layout is not torch.strided or value.is_contiguous() or value.is_conj():
        return value.clone()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.as_strided((extent,), (1,)).clone().as_strided(value.shape, value.stride(), 0)
