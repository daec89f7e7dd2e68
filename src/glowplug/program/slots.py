"""Slots of deferred pieces: a piece that runs seldom in a step, such as a model's first or last, serves uncompiled
while another process compiles it, and its program takes the code between two sequences.

On two cores a piece takes two to three seconds to compile. One that runs once in a step of dozens of pieces saves less
in all the steps of those seconds than its compilation would delay the first.
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
"""Largest share of a program's pieces that may start uncompiled, all of them together."""
_ANYWAY = 2
"""So many may at any depth, as long as others run more often: what they cost a step does not depend on its length."""
_RUNS = 4
"""Runs whose inputs are kept, to try the compiled piece on: those of the comparison with eager, mostly."""
_LARGEST = 2**20
"""Elements of the inputs kept, not counting weights: at most."""


class PieceSlot:
    """The place of a deferred piece in programs: runs its graph, and keeps the inputs of its first runs, until code for
    it has arrived in a store.

    Args:
        fingerprint: the piece's.
        graph: the uncompiled piece.
        pieces: the store.
        job: the job of this process that compiles the piece; None: a process that holds its lock does.
        address: what the store knows it by; empty: the fingerprint's digest.

    Attributes:
        compiled: its code, once it has arrived and was found to compute the same.
        pending: whether it may still arrive.
        ours: whether the job compiled it.
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
        """Take the code from the store, once nobody is at it any more, and if it computes the same. Waits until
        `deadline` (`time.monotonic()`)."""
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
            logger.log(level, "glowplug: piece %s stays uncompiled: %s", self.fingerprint.digest[:12], problem)
        self.pending, self.job = False, None
        self._seen.clear()

    def _try(self, code: Run) -> str | None:
        """Why code must not be used: on the inputs that the graph had, it gives something else; None when it may."""
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
    """A program with the code that has arrived in its slots. Whoever runs the old one meanwhile sees nothing of it."""
    slots = [run for run in program.slots.values() if isinstance(run, PieceSlot)]
    arrived = {slot.fingerprint: slot.compiled for slot in slots if slot.compiled is not None}
    return program.with_slots(arrived) if arrived else program


def count_uses(prints: Iterable[Fingerprint | None]) -> Counter[Fingerprint]:
    """How often each piece runs, from the fingerprint of each step (None: an op)."""
    return Counter(found for found in prints if found is not None)


def choose_deferred(uses: Counter[Fingerprint], pieces: Mapping[Fingerprint, Piece]) -> set[Fingerprint]:
    """The pieces that may start uncompiled: those used least often, as long as all of them together are few.

    Args:
        uses: how often each distinct piece runs in a step.
        pieces: one of each.
    """
    left = max(sum(uses.values()) * _SHARE, _ANYWAY)
    chosen: set[Fingerprint] = set()
    for count in sorted(set(uses.values()))[:-1]:
        some = {found for found, often in uses.items() if often == count}
        left -= count * len(some)
        if left < 0:
            break
        chosen |= some
    return {found for found in chosen & pieces.keys() if not _writes(pieces[found])}


def _writes(piece: Piece) -> bool:
    """Whether a piece may write to its inputs, or to anything that it did not make: a trial would do so twice."""
    nodes = list(piece.gm.graph.nodes)
    given = {storage for node in nodes if node.op == "placeholder" for storage in _storages([node])}
    for node in nodes:
        if node.op in ("placeholder", "output") or not may_mutate(node):
            continue
        touched = _storages(node.all_input_nodes)
        if not touched or touched & given:
            return True
    return False


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    """The memory that values lie in; views of a tensor lie in its own."""
    values = [node.meta.get("example_value") for node in nodes]
    return {value.untyped_storage()._cdata for value in values if isinstance(value, Tensor)}
