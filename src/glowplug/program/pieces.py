"""The compiled pieces of one model, shared by its programs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from glowplug.background.job import Job
from glowplug.compilers.base import PieceCompiler, StoringCompiler
from glowplug.graph.fingerprint import Fingerprint
from glowplug.program.piece_store import PieceStore, Run
from glowplug.program.slots import PieceSlot
from glowplug.report import Report
from glowplug.runtime.forks import make_lock

_LOCKED_S = 30.0
"""How long to wait for a job to lock its pieces."""


@dataclass(frozen=True)
class HandedOver:
    """Pieces that a helper compiles.

    Attributes:
        job: the helper's.
        channel: where it stores them.
        pieces: the pieces.
        sizes: the symbolic sizes of their capture, see `glowplug.graph.shapes.symbolic_sizes`.
    """

    job: Job
    channel: PieceStore
    pieces: frozenset[Fingerprint]
    sizes: Mapping[str, Any]


@dataclass
class PieceCache:
    """Compiled pieces of one model by fingerprint, shared by its programs.

    Attributes:
        compiled: the compiled pieces.
        order: the fingerprint of each distinct piece, including deferred pieces.
        slots: slots of the pieces that still run uncompiled.
        store: where compiled pieces are looked up and kept.
        addresses: store addresses of pieces whose compilation added guards on sizes. Such a piece is valid only for a
            program with the same guards, so its address is not just its digest.
        count: how many pieces were compiled by this process and its jobs.
        ahead: the pieces that a helper compiles since before the trace whose pieces they may be.
    """

    compiled: dict[Fingerprint, Run] = field(default_factory=dict)
    order: list[Fingerprint] = field(default_factory=list)
    slots: list[PieceSlot] = field(default_factory=list)
    store: PieceStore | None = None
    addresses: dict[Fingerprint, str] = field(default_factory=dict)
    count: int = 0
    ahead: HandedOver | None = None
    lock: Any = field(default_factory=make_lock)

    def channel(self, compiler: PieceCompiler) -> PieceStore | None:
        """The store through which this process's jobs hand over pieces: the model's, or else a temporary one that is
        deleted when nothing refers to it. None if neither is possible."""
        if self.store is not None and self.store.writable:
            return self.store
        return PieceStore.temporary(compiler) if isinstance(compiler, StoringCompiler) else None

    def add(self, pieces: Mapping[Fingerprint, Run]) -> None:
        """Add the pieces of a stored program."""
        self.slots += [run for run in pieces.values() if isinstance(run, PieceSlot)]
        self.compiled |= {piece: run for piece, run in pieces.items() if not isinstance(run, PieceSlot)}
        self.order += [piece for piece in pieces if piece not in self.order]

    def load(self, fingerprint: Fingerprint) -> bool:
        """Load a piece from the store; returns whether it was there."""
        run = self.store.load(fingerprint.digest) if self.store is not None and fingerprint.stable else None
        if run is not None:
            self.compiled[fingerprint] = run
        return run is not None

    def poll(self, report: Report, deadline: float | None = None) -> None:
        """Pick up deferred pieces whose code has arrived, waiting for them until `deadline` (`time.monotonic()`)."""
        if not self.slots:
            return
        if not self.lock.acquire(timeout=max(deadline - time.monotonic(), 0) if deadline is not None else 0):
            return  # another thread is compiling or polling; don't block this one
        try:
            for slot in self.slots:
                slot.poll(deadline)
                report.compiled_pieces += slot.ours
                if slot.compiled is not None:
                    self.compiled[slot.fingerprint] = slot.compiled
            self.slots = [slot for slot in self.slots if slot.pending]
            report.pending_pieces = len(self.pending)
        finally:
            self.lock.release()

    @property
    def pending(self) -> dict[Fingerprint, PieceSlot]:
        """The slot of each piece that still runs uncompiled."""
        return {slot.fingerprint: slot for slot in self.slots}

    def take_ahead(self) -> HandedOver | None:
        """What a helper compiles ahead, which is forgotten here."""
        ahead, self.ahead = self.ahead, None
        return ahead

    def wait_until_locked(self) -> None:
        """Wait until other processes can see which pieces this process's jobs are compiling."""
        for job in self._jobs():
            job.outcome(time.monotonic() + _LOCKED_S)

    def finish(self) -> None:
        """Wait for this process's jobs to end, without loading what they compiled."""
        for job in self._jobs():
            job.ended(math.inf)

    def _jobs(self) -> list[Job]:
        return [slot.job for slot in self.slots if slot.job is not None]
