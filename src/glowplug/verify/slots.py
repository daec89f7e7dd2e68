"""Compares compiled code with its own graph on the same inputs, with the same outputs of layer ops. In a single piece
compiling changes only the rounding, however much later layers amplify it.
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
"""How many times at most a graph is rerun with other rounding of its inputs."""


def run_both(own: Run, compiled: Run, args: Sequence[Any]) -> tuple[Any, str | None]:
    """Run a graph, or a layer's own code, and its compiled form on the same inputs.

    If they differ by more than the tolerance, the graph is rerun with other rounding of its inputs: if two experts are
    nearly tied, the router may then choose the other one, and so may compiled code.

    Returns:
        The graph's outputs; and how the compiled form differs by more than rounding, in words, or None.
    """
    tape = Tape()
    copies = list(map(_copy, args))  # code may write to its inputs
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
    with tape.replaying() as op_inputs:
        outputs = run(*args)
    return _effects(outputs, args, op_inputs)


def _effects(outputs: Any, args: Sequence[Any], op_inputs: Any) -> dict[str, Any]:
    """Everything that a run changes or passes on."""
    several = isinstance(outputs, (list, tuple))
    return {"output": tuple(outputs) if several else (outputs,), "inputs afterwards": tuple(args), "ops get": op_inputs}


def _copy(value: Any) -> Any:
    """A copy of a value that a piece may write to; pieces don't write to parameters."""
    return value if isinstance(value, torch.nn.Parameter) else copy_of(value)


def _rounded_otherwise(value: Any, generator: torch.Generator) -> Any:
    """A copy of an activation with random changes in the last bit of its numbers."""
    copy = _copy(value)
    if not isinstance(copy, torch.Tensor) or copy is value or not copy.is_floating_point() or 0 in copy.stride():
        return copy
    noise = torch.rand(copy.shape, generator=generator).to(copy.device) * 2 - 1
    wide = copy.to(torch.promote_types(copy.dtype, torch.float32))
    return copy.copy_(wide * (1 + torch.finfo(copy.dtype).eps * noise))
