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
from glowplug.program.paired import why_different
from glowplug.program.piece_store import PieceStore, Run
from glowplug.program.program import Program
from glowplug.reasons import said

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
    """The place of a deferred piece in programs: runs its graph, and keeps the inputs of its first runs.

    Args:
        fingerprint: the piece's.
        graph: the uncompiled piece.
        address: what a store knows it by; empty: the fingerprint's digest.

    Attributes:
        compiled: its code, once it has arrived and was found to compute the same.
        pending: whether it may still arrive.
    """

    def __init__(self, fingerprint: Fingerprint, graph: Run, address: str = "") -> None:
        self.fingerprint = fingerprint
        self.graph = graph
        self.address = address or fingerprint.digest
        self.compiled: Run | None = None
        self.pending = True
        self._seen: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Run the uncompiled piece."""
        if self.pending and len(self._seen) < _RUNS and sum(map(_size, args)) <= _LARGEST:
            self._seen.append(args)
        return self.graph(*args)

    def settle(self, code: Run | None) -> None:
        """Take the code that has arrived, if it computes the same; None: none ever will."""
        problem = self._try(code) if code is not None else "it was not delivered"
        if problem is None:
            self.compiled = code
        else:
            level = logging.INFO if code is None else logging.WARNING
            logger.log(level, "glowplug: piece %s stays uncompiled: %s", self.fingerprint.digest[:12], problem)
        self.pending = False
        self._seen.clear()

    def _try(self, code: Run) -> str | None:
        """Why code must not be used: on the inputs that the graph had, it gives something else; None when it may."""
        with torch.no_grad():
            for args in self._seen:
                try:
                    problem = why_different(code(*args), self.graph(*args))
                except Exception as exc:
                    problem = f"it raised {said(exc)}"
                if problem is not None:
                    return problem
        return None


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter) else 0


def with_arrived(program: Program, slots: tuple[PieceSlot, ...]) -> tuple[Program, tuple[PieceSlot, ...]]:
    """A program with the code that has arrived in some of its slots, and the slots that are left pending."""
    pending = tuple(slot for slot in slots if slot.pending)
    arrived = {id(slot): slot.compiled for slot in slots if slot not in pending and slot.compiled is not None}
    return program.replacing(arrived) if arrived else program, pending


class Deferred:
    """Deferred pieces of one program: whoever compiles them, their code comes through a store.

    Args:
        slots: their slots.
        pieces: the store.
        job: the job of this process that compiles them; None: a process that holds their locks does.

    Attributes:
        compiled: how many of them this process's job compiled.
    """

    def __init__(self, slots: tuple[PieceSlot, ...], pieces: PieceStore, job: Job | None = None) -> None:
        self.slots = slots
        self.pieces = pieces
        self.job = job
        self.compiled = 0

    @property
    def pending(self) -> bool:
        """Whether code may still arrive."""
        return any(slot.pending for slot in self.slots)

    def poll(self, deadline: float | None = None) -> None:
        """Take what was compiled, once nobody is at it any more. Waits until `deadline` (`time.monotonic()`)."""
        if self.job is not None and not self.job.ended(deadline):
            return
        if not self.pieces.lost and any(self.pieces.busy(slot.address, deadline) for slot in self.slots):
            return
        outcome = self.job.outcome() if self.job is not None and self.job.ours else None
        ours = outcome.facts.get("compiled", ()) if outcome is not None else ()
        for slot in self.slots:
            code = self.pieces.load(slot.address) if not self.pieces.lost else None
            self.compiled += code is not None and slot.address in ours
            slot.settle(code)


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
