"""Replays layer ops: what an op gave inside an uncompiled piece, it gives inside the compiled one.

An op may turn a difference of rounding into one of another order: where a router finds two experts nearly tied, the
last bit of its input chooses. So when a compiled piece is compared with its own graph, both see the same outputs of the
ops inside, and what each hands to them is compared as well. Each op runs once, writes once, and, with
`identity="ordered"`, takes its layer once.
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
    """One call of an op, as it was recorded."""

    args: Any
    output: Any
    written: dict[int, Any]


class Tape:
    """The calls of ops inside a piece: recorded once, replayed as often as wanted."""

    def __init__(self) -> None:
        self._calls: dict[str, list[_Call]] = {}
        self._replay: dict[str, list[Any]] | None = None

    @property
    def given(self) -> dict[str, list[Any]]:
        """What each op was given in each of its calls while they were recorded."""
        return {op: [call.args for call in calls] for op, calls in self._calls.items()}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Ops run, and are recorded."""
        self._replay = None
        with self._in_use():
            yield

    @contextmanager
    def replaying(self) -> Iterator[dict[str, list[Any]]]:
        """Ops give what they gave while they were recorded, and do not run. Yields what they are given."""
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
        """One call of an op.

        Args:
            op: its name.
            identity: by what it finds its layer.
            find_layer: finds it.
            fn: what it does.
            args: what else it is given.
            writes: which of these it writes to.
        """
        name = f"{op} of {getattr(identity, 'name', identity)}"
        given = copy_of(args)
        if self._replay is None:
            output = fn(find_layer(), *args)
            written = {index: copy_of(args[index]) for index in writes}
            self._calls.setdefault(name, []).append(_Call(given, copy_of(output), written))
            return output
        before = self._replay.setdefault(name, [])
        before.append(given)
        if len(before) > len(self._calls.get(name, ())):
            raise LayerLookupError(f"{op} is called more often than its calls were recorded")
        known = self._calls[name][len(before) - 1]
        for index, value in known.written.items():
            if isinstance(value, Tensor):
                args[index].copy_(value)
        return copy_of(known.output)


_current: ContextVar[Tape | None] = ContextVar("glowplug_tape", default=None)


def current_tape() -> Tape | None:
    """The tape that ops are recorded on or replayed from, in this thread."""
    return _current.get()


def copy_of(value: Any) -> Any:
    """A copy of a tensor, of the same strides, on which compiled code relies; or of those in a list or tuple."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(copy_of, value))
    if not isinstance(value, Tensor):
        return value
    if type(value) is not Tensor or value.layout is not torch.strided or value.is_contiguous() or value.is_conj():
        return value.clone()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.as_strided((extent,), (1,)).clone().as_strided(value.shape, value.stride(), 0)
