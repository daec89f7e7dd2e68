"""Slots of deferred pieces: a piece that runs seldom in a step, such as a model's first or last, runs uncompiled until
another process has compiled it. The program switches to the compiled code between two sequences.

On two cores a piece takes two to three seconds to compile. For a piece that runs once in a step of dozens of pieces,
compiled code saves less time during those seconds than waiting for it would cost the first step.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from glowplug.background.job import Job
from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.split import Piece, may_mutate
from glowplug.program.piece_store import PieceStore, Run
from glowplug.program.program import Program
from glowplug.reasons import said
from glowplug.verify.slots import run_both

logger = logging.getLogger("glowplug")

_SHARE = 1 / 8
"""Largest share of a step's pieces that may be deferred."""
_ANYWAY = 2
"""Number of pieces that may be deferred at any depth, as long as others run more often."""
_RUNS = 4
"""Runs whose inputs are kept to try the compiled piece on; most come from the comparison with eager."""
_LARGEST = 2**20
"""Largest number of input elements kept per run, not counting weights."""


class PieceSlot:
    """The place of a deferred piece in programs. Until compiled code arrives in the store, it runs the piece's graph,
    and keeps the inputs of the first runs to try the compiled code on.

    Args:
        fingerprint: the piece's fingerprint.
        graph: the uncompiled piece.
        pieces: the store in which the code arrives.
        job: this process's job that compiles the piece; None if another process compiles it and holds its lock.
        address: the piece's address in the store; defaults to its digest.

    Attributes:
        compiled: the compiled code, once it has arrived and computes the same as the graph.
        pending: whether code may still arrive.
        ours: whether this process's job compiled it.
    """

    def __init__(
        self, fingerprint: Fingerprint, graph: Run, pieces: PieceStore, job: Job | None = None, address: str = ""
    ) -> None:
        self.fingerprint = fingerprint
        self.graph = graph
        self.address = address or fingerprint.digest
        self.pieces = pieces
        self.job = job
        self.compiled: Run | None = None
        self.pending = True
        self.ours = False
        self._seen: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Run the uncompiled piece."""
        if self.pending and len(self._seen) < _RUNS and sum(map(_size, args)) <= _LARGEST:
            self._seen.append(args)
        return self.graph(*args)

    def poll(self, deadline: float | None = None) -> None:
        """Once no process is compiling the piece, load its code and keep it if it computes the same as the graph. Waits
        for that until `deadline` (`time.monotonic()`)."""
        if self.job is not None and not self.job.ended(deadline):
            return
        if not self.pieces.lost and self.pieces.busy(self.address, deadline):
            return
        code = self.pieces.load(self.address) if not self.pieces.lost else None
        outcome = self.job.outcome() if self.job is not None and self.job.ours else None
        self.ours = code is not None and outcome is not None and self.address in outcome.facts.get("compiled", ())
        problem = self._try(code) if code is not None else "it was not delivered"
        if problem is None:
            self.compiled = code
        else:
            level = logging.INFO if code is None else logging.WARNING
            logger.log(
                level,
                "glowplug: piece %s stays uncompiled, with the same results: %s",
                self.fingerprint.digest[:12],
                problem,
            )
        self.pending, self.job = False, None
        self._seen.clear()

    def _try(self, code: Run) -> str | None:
        """How the compiled code differs from the graph on the graph's recorded inputs; None if it agrees."""
        with torch.no_grad():
            for args in self._seen:
                try:
                    _, problem = run_both(self.graph, code, args)
                except Exception as exc:
                    problem = f"it raised {said(exc)}"
                if problem is not None:
                    return problem
        return None


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter) else 0


def with_arrived(program: Program) -> Program:
    """A copy of a program that runs the compiled code that has arrived; runs of the old program are not affected."""
    slots = [run for run in program.slots.values() if isinstance(run, PieceSlot)]
    arrived = {slot.fingerprint: slot.compiled for slot in slots if slot.compiled is not None}
    return program.with_slots(arrived) if arrived else program


def choose_deferred(uses: Counter[Fingerprint], pieces: Mapping[Fingerprint, Piece]) -> set[Fingerprint]:
    """The pieces to defer: the least used ones (`uses`: how often each runs in a step), as long as they make up a small
    share of the step."""
    left = max(sum(uses.values()) * _SHARE, _ANYWAY)
    chosen: set[Fingerprint] = set()
    for count in sorted(set(uses.values()))[:-1]:
        equally_often = {fingerprint for fingerprint, often in uses.items() if often == count}
        left -= count * len(equally_often)
        if left < 0:
            break
        chosen |= equally_often
    return {fingerprint for fingerprint in chosen & pieces.keys() if not _writes(pieces[fingerprint])}


def _writes(piece: Piece) -> bool:
    """Whether a piece may write to memory that it did not allocate: trying its compiled code would write twice."""
    nodes = list(piece.gm.graph.nodes)
    inputs = _storages(node for node in nodes if node.op == "placeholder")
    for node in nodes:
        if node.op in ("placeholder", "output") or not may_mutate(node):
            continue
        touched = _storages(node.all_input_nodes)
        if not touched or touched & inputs:
            return True
    return False


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    """Ids of the memory that values lie in; a view shares its tensor's."""
    values = [node.meta.get("example_value") for node in nodes]
    return {value.untyped_storage()._cdata for value in values if isinstance(value, Tensor)}
