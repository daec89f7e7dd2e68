"""Replays layer ops: what an op gave inside an uncompiled piece, it gives inside the compiled one.

An op may turn a difference of rounding into one of another order: where a router finds two experts nearly tied, the
last bit of its input chooses. So when a compiled piece is compared with its uncompiled form, both see the same outputs
of the ops inside, and what each hands to them is compared as well.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Compare = Callable[[Sequence[Any], Sequence[Any]], str | None]
"""Why the first values are not the second ones, or None."""


@dataclass
class _Call:
    """One call of an op, as it was recorded."""

    args: tuple[Any, ...]
    output: Any
    written: dict[int, Any]


@dataclass
class Tape:
    """The calls of ops inside a piece.

    Attributes:
        compare: compares what an op is given with what it was given.
        problem: what was different, in words, or None.
    """

    compare: Compare
    problem: str | None = None
    _calls: dict[tuple[str, int], deque[_Call]] = field(default_factory=lambda: defaultdict(deque))
    _replays: bool = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Ops run, and are recorded."""
        with self._in_use():
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Ops give what they gave while they were recorded, and do not run."""
        self._replays = True
        with self._in_use():
            yield
        if any(self._calls.values()):
            self.problem = self.problem or "compiled it makes fewer calls of ops than uncompiled"

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def call(self, op: str, fn: Callable[..., Any], layer: nn.Module, args: tuple[Any, ...], writes: set[int]) -> Any:
        """One call of an op.

        Args:
            op: its name.
            fn: what it does.
            layer: the layer that it found.
            args: what else it is given.
            writes: which of these it writes to.
        """
        calls = self._calls[op, id(layer)]
        if not self._replays:
            given = tuple(_copy(arg) for arg in args)
            output = fn(layer, *args)
            calls.append(_Call(given, _copy(output), {index: _copy(args[index]) for index in writes}))
            return output
        if not calls:
            self.problem = self.problem or f"compiled it calls {op} more often than uncompiled"
            return fn(layer, *args)
        known = calls.popleft()
        different = self.compare(_flat(args), _flat(known.args))
        if different is not None:
            self.problem = self.problem or f"{different}, in what it hands to {op}"
        for index, value in known.written.items():
            if isinstance(value, Tensor):
                args[index].copy_(value)
        return known.output


_current: ContextVar[Tape | None] = ContextVar("glowplug_tape", default=None)


def current_tape() -> Tape | None:
    """The tape that ops are recorded on or replayed from, in this thread."""
    return _current.get()


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(item) for item in value)
    return value


def _flat(values: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        found += _flat(value) if isinstance(value, (list, tuple)) else [value]
    return found
