"""Compares compiled code with its own graph on the same inputs, the ops inside giving the same outputs: what compiling
does to one piece is rounding, whatever becomes of it in the layers behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from glowplug.ops.tape import Tape, copy_of
from glowplug.reasons import said
from glowplug.verify.closeness import COMPILED, difference

Run = Callable[..., Any]


_ROUNDINGS = 32
"""Ways of rounding its inputs that a graph is tried with, at most."""


def run_both(own: Run, compiled: Run, args: Sequence[Any]) -> tuple[Any, str | None]:
    """Run a graph, or a layer's own code, and the compiled form of it on the same inputs.

    What rounding does is told by the graph itself: a router that finds two experts nearly tied takes another one once
    its inputs are rounded otherwise, and compiled code may do so, too.

    Returns:
        What the graph gave; and how the compiled form differs from it by more than rounding, in words, or None.
    """
    tape = Tape()
    copies = list(map(_copy, args))  # code that writes to what it is given would do so twice
    again = list(map(_copy, args))
    with tape.recording():
        outputs = own(*args)
    expected = _effects(outputs, args, tape.given)
    try:
        actual = _replay(compiled, copies, tape)
    except Exception as exc:
        return outputs, f"compiled it raises {said(exc)}"
    problem = difference(actual, expected, COMPILED, "compiled")
    roundings: list[Any] = []
    generator = torch.Generator().manual_seed(0)
    while problem is not None and len(roundings) < _ROUNDINGS:
        roundings.append(_replay(own, [_rounded_otherwise(value, generator) for value in again], tape))
        problem = difference(actual, expected, COMPILED, "compiled", roundings)
    return outputs, problem


def _replay(run: Run, args: Sequence[Any], tape: Tape) -> dict[str, Any]:
    with tape.replaying() as given:
        outputs = run(*args)
    return _effects(outputs, args, given)


def _effects(outputs: Any, args: Sequence[Any], given: Any) -> dict[str, Any]:
    """Everything that a run does."""
    several = isinstance(outputs, (list, tuple))
    return {"output": tuple(outputs) if several else (outputs,), "inputs afterwards": tuple(args), "ops get": given}


def _copy(value: Any) -> Any:
    """Of anything that a piece may write to: it does not write to parameters."""
    return value if isinstance(value, torch.nn.Parameter) else copy_of(value)


def _rounded_otherwise(value: Any, generator: torch.Generator) -> Any:
    """A copy of an activation in which the last bit of each number is another one."""
    made = _copy(value)
    if not isinstance(made, torch.Tensor) or made is value or not made.is_floating_point() or 0 in made.stride():
        return made
    noise = torch.rand(made.shape, generator=generator).to(made.device) * 2 - 1
    wide = made.to(torch.promote_types(made.dtype, torch.float32))
    return made.copy_(wide * (1 + torch.finfo(made.dtype).eps * noise))
