"""A program that is ready to serve calls, and what each sequence under way runs."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from glowplug.bodies import InUse
from glowplug.front import Call, FrontEnd
from glowplug.graph.shapes import ShapeAssumptions
from glowplug.layers.context import ForwardContext, forward_context
from glowplug.layers.watch import Watch
from glowplug.program import Program, with_arrived


@dataclass(frozen=True)
class Refusal:
    """Why no program serves a call.

    Attributes:
        reason: in words; empty when it is recorded already.
        watch: finds changes of the model, after which another attempt is worth while; None: it never is.
        eager: the model's own forward is to run, and not a full trace of it under Dynamo's guards.
        build: the call for which another process is to build a program.
    """

    reason: str
    watch: Watch | None = None
    eager: bool = True
    build: Call | None = None


@dataclass(frozen=True)
class Running:
    """What a sequence runs from its beginning to its end."""

    program: Program
    bodies: InUse


class Sequences:
    """The sequences that one program serves, by their cache: what arrives later is used from the next one on."""

    def __init__(self) -> None:
        self._running: dict[int, tuple[weakref.ref[Any], Running]] = {}

    def begin(self, cache: Any, running: Running) -> Running:
        """A sequence begins with a cache; one without ends with its first call."""
        if cache is not None:
            number, running_by = id(cache), self._running

            def forget(_: Any) -> None:
                running_by.pop(number, None)

            try:
                self._running[number] = weakref.ref(cache, forget), running
            except TypeError:  # a cache of a class without weak references goes with the latest
                running_by.pop(number, None)
        return running

    def of(self, cache: Any) -> Running | None:
        """What the sequence of a cache runs; None when it began elsewhere, such as in eager."""
        found = self._running.get(id(cache))
        return found[1] if found is not None and found[0]() is cache else None


@dataclass
class Ready:
    """A program that serves calls.

    Attributes:
        front: the front end whose calls it serves.
        program: the program, with every piece that has arrived.
        assumptions: what its trace assumed of sizes.
        returns: what the front end needs to know to wrap its outputs.
        sequences: what each sequence under way runs.
    """

    front: FrontEnd
    program: Program
    assumptions: ShapeAssumptions
    returns: Any
    sequences: Sequences = field(default_factory=Sequences)
    _checked: dict[tuple[tuple[int, ...], ...], str | None] = field(default_factory=dict)

    def begin(self, cache: Any, bodies: InUse) -> Running:
        """What a sequence that begins with a cache is to run: the pieces that have arrived, and these bodies."""
        self.program = with_arrived(self.program)
        return self.sequences.begin(cache, Running(self.program, bodies))

    def broken_by(self, call: Call) -> str | None:
        """Why a call can't be served; None when it can. Fills in what the call leaves out."""
        missing = self.front.missing(self.program.arguments, call)
        if missing is not None:
            return missing
        shapes = self.front.shapes(self.program.arguments, call)
        key = tuple(shapes.values())
        if key not in self._checked:
            self._checked[key] = self.assumptions.broken_by(shapes, smallest=self.front.smallest)
        return self._checked[key]


def run_program(front: FrontEnd, program: Program, call: Call, context: ForwardContext) -> Sequence[Any]:
    """What a program returns for a call."""
    return run_inputs(program, front.inputs(program.arguments, call), context)


def run_inputs(program: Program, inputs: Sequence[Any], context: ForwardContext) -> Sequence[Any]:
    """What a program returns for its inputs."""
    with torch.no_grad(), forward_context(context):
        return program.run(*inputs)
