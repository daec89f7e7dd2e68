"""Compares compiled pieces with their uncompiled forms, each on the same inputs, the outputs of the ops inside them
being the same: what compiling does to one piece is rounding, whatever becomes of it in the layers behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from glowplug.closeness import distance
from glowplug.ops.tape import Tape
from glowplug.program.program import Program

T = TypeVar("T")

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest ||compiled - uncompiled|| / ||uncompiled|| of a piece's output. Half precision: 0.05."""


def why_different(actual: Sequence[Any], expected: Sequence[Any]) -> str | None:
    """Why the outputs of a compiled piece are not those of its uncompiled form; None when they are."""
    if len(actual) != len(expected):
        return f"compiled it gives {len(actual)} outputs, uncompiled {len(expected)}"
    for one, other in zip(actual, expected, strict=True):
        if isinstance(one, Tensor) != isinstance(other, Tensor):
            return "compiled it gives something else than a tensor, or the other way round"
        if isinstance(other, Tensor) and other.is_floating_point():
            allowed = _TOLERANCE.get(other.dtype, 0.05)
            error = distance(one, other) if one.shape == other.shape else float("inf")
            if not error <= allowed:
                return f"compiled it differs by {error:.1e} from uncompiled (allowed {allowed:.0e})"
        elif isinstance(other, Tensor) and not torch.equal(one, other):
            return "compiled it gives other integers than uncompiled"
        elif not isinstance(other, Tensor) and one is not other and one != other:
            return f"compiled it gives {one!r:.40}, uncompiled {other!r:.40}"
    return None


class _Pair:
    """An uncompiled piece that also runs its compiled form, and notes whether that differs."""

    def __init__(self, uncompiled: Callable[..., Sequence[Any]], compiled: Callable[..., Sequence[Any]]) -> None:
        self.uncompiled = uncompiled
        self.compiled = compiled
        self.problem: str | None = None

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Run both; the uncompiled outputs go on."""
        if self.problem is not None:
            return self.uncompiled(*args)
        # One that writes to what it is given would do so twice.
        copies = [arg.clone() if _may_be_written(arg) else arg for arg in args]
        tape = Tape(why_different)
        with tape.recording():
            outputs = self.uncompiled(*args)
        with tape.replaying():
            compiled = self.compiled(*copies)
        self.problem = tape.problem or why_different(compiled, outputs)
        return outputs


def _may_be_written(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter)


def try_pieces(program: Program, uncompiled: Program, run: Callable[[Program], T]) -> tuple[T, str | None]:
    """Run a program with uncompiled pieces, and each compiled piece on what its uncompiled form gets.

    Args:
        program: the program.
        uncompiled: the same steps with uncompiled pieces.
        run: runs a program.

    Returns:
        What `run` returned; and which piece differs by more than rounding, and how; None when none does.
    """
    pairs = {slot: _Pair(uncompiled.slots[slot], compiled) for slot, compiled in program.slots.items()}
    result = run(uncompiled.with_slots(pairs))
    problems = (f"piece {slot.digest[:12]}: {pair.problem}" for slot, pair in pairs.items() if pair.problem is not None)
    return result, next(problems, None)
