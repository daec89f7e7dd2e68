"""Compares compiled code with its own graph on the same inputs, with the same outputs of layer ops. In a single piece
compiling changes only the rounding, however much later layers amplify it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from glowplug.ops.tape import Tape, copy_of
from glowplug.reasons import said
from glowplug.verify.closeness import COMPILED, difference

Run = Callable[..., Any]

_ROUNDINGS = 32
"""How many times at most a graph is rerun with other rounding of its inputs."""


@dataclass(frozen=True)
class GraphRun:
    """A run of a graph, or of a layer's own code, and all that a run of its compiled form must equal.

    Attributes:
        own: the graph.
        args: its inputs as they were before the run. Tensors are copies, except parameters.
        tape: the layer ops that it called.
        effects: everything that it changed or passed on, until other code writes to that.
    """

    own: Run
    args: tuple[Any, ...]
    tape: Tape
    effects: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the copies that it holds."""
        held = [leaf for leaf in tree_leaves((self.args, self.effects)) if isinstance(leaf, Tensor)]
        return sum(tensor.nbytes for tensor in held if not isinstance(tensor, nn.Parameter))

    def kept(self) -> GraphRun:
        """The same, with copies of the effects that other code may write to."""
        copies = {name: tuple(map(_copy, self.effects[name])) for name in ("output", "inputs afterwards")}
        return replace(self, effects={**self.effects, **copies})

    def problem_of(self, compiled: Run) -> str | None:
        """How the compiled form differs by more than rounding, in words, or None.

        If it differs by more than the tolerance, the graph is run again, as weights may have changed since, and with
        other rounding of its inputs: if two experts are nearly tied, the router may then choose the other one, and so
        may compiled code.
        """
        try:
            actual = _replay(compiled, list(map(_copy, self.args)), self.tape)
        except Exception as exc:
            return f"compiled it raises {said(exc)}"
        problem = difference(actual, self.effects, COMPILED, "compiled")
        if problem is None:
            return None
        expected = _replay(self.own, list(map(_copy, self.args)), self.tape)
        roundings: list[Any] = []
        generator = torch.Generator().manual_seed(0)
        while problem is not None and len(roundings) < _ROUNDINGS:
            inputs = [_rounded_otherwise(value, generator) for value in self.args]
            roundings.append(_replay(self.own, inputs, self.tape))
            problem = difference(actual, expected, COMPILED, "compiled", roundings)
        return problem


def run_graph(own: Run, args: Sequence[Any]) -> tuple[Any, GraphRun]:
    """Run a graph, or a layer's own code. Returns its outputs, and what a run of its compiled form must equal."""
    tape = Tape()
    before = tuple(map(_copy, args))  # code may write to its inputs
    with tape.recording():
        outputs = own(*args)
    return outputs, GraphRun(own, before, tape, _effects(outputs, args, tape.given))


def run_both(own: Run, compiled: Run, args: Sequence[Any]) -> tuple[Any, str | None]:
    """Run a graph, or a layer's own code, and its compiled form on the same inputs.

    Returns:
        The graph's outputs; and how the compiled form differs by more than rounding, in words, or None.
    """
    outputs, run = run_graph(own, args)
    return outputs, run.problem_of(compiled)


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
    return value if isinstance(value, nn.Parameter) else copy_of(value)


def _rounded_otherwise(value: Any, generator: torch.Generator) -> Any:
    """A copy of an activation with random changes in the last bit of its numbers."""
    copy = _copy(value)
    if not isinstance(copy, Tensor) or copy is value or not copy.is_floating_point() or 0 in copy.stride():
        return copy
    noise = torch.rand(copy.shape, generator=generator).to(copy.device) * 2 - 1
    wide = copy.to(torch.promote_types(copy.dtype, torch.float32))
    return copy.copy_(wide * (1 + torch.finfo(copy.dtype).eps * noise))
