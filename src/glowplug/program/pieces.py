"""The compiled pieces of one model: each distinct one compiled once, or taken from a store."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glowplug.background.job import Job, Say, orphaned
from glowplug.compilers.base import PieceCompiler, StoringCompiler
from glowplug.errors import CompileError
from glowplug.graph.capture import Captured, is_restart
from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.split import Piece
from glowplug.program.piece_store import PieceStore, Run
from glowplug.program.slots import PieceSlot, choose_deferred
from glowplug.reasons import why
from glowplug.report import Report
from glowplug.runtime.forks import make_lock
from glowplug.runtime.progress import piece_progress

_WAIT_S = 600.0
"""How long to wait for another process that compiles the same piece."""
_PATIENCE_S = 60.0
"""How much longer than this process a fork may take, before its pieces are compiled here."""
_GLANCE_S = 0.1
"""How long to wait for a lock that another process may only be asking about."""
_BEGIN_S = 30.0
"""How long a job may take to hold the locks of its pieces."""


@dataclass
class PieceCache:
    """Compiled pieces of one model, by fingerprint: programs for further signatures reuse them.

    Attributes:
        compiled: the pieces.
        order: the fingerprint of each distinct piece, deferred ones too.
        slots: those of pieces that run uncompiled for now.
        store: where to look for compiled pieces, and to keep them.
        addresses: what the store knows a piece by that holds only with relations between sizes which its compilation
            wrote down; a program that keeps to them may use it.
        count: how many pieces were compiled here.
    """

    compiled: dict[Fingerprint, Run] = field(default_factory=dict)
    order: list[Fingerprint] = field(default_factory=list)
    slots: list[PieceSlot] = field(default_factory=list)
    store: PieceStore | None = None
    addresses: dict[Fingerprint, str] = field(default_factory=dict)
    count: int = 0
    lock: Any = field(default_factory=make_lock)

    def channel(self, compiler: PieceCompiler) -> PieceStore | None:
        """The store through which jobs of this process hand pieces over: the model's, or else a temporary one, which
        goes with its holder. None where there can be none."""
        if self.store is not None and self.store.writable:
            return self.store
        return PieceStore.temporary(compiler) if isinstance(compiler, StoringCompiler) else None

    def add(self, pieces: Mapping[Fingerprint, Run]) -> None:
        """Take the pieces of a stored program."""
        self.slots += [run for run in pieces.values() if isinstance(run, PieceSlot)]
        self.compiled |= {piece: run for piece, run in pieces.items() if not isinstance(run, PieceSlot)}
        self.order += [piece for piece in pieces if piece not in self.order]

    def load(self, found: Fingerprint) -> bool:
        """Take a piece from the store; returns whether it was there."""
        run = self.store.load(found.digest) if self.store is not None and found.stable else None
        if run is not None:
            self.compiled[found] = run
        return run is not None

    def poll(self, report: Report, deadline: float | None = None) -> None:
        """Take what was compiled beside serving; wait for it until `deadline` (`time.monotonic()`), if given."""
        if not self.slots:
            return
        if not self.lock.acquire(timeout=max(deadline - time.monotonic(), 0) if deadline is not None else 0):
            return  # another thread compiles pieces, or polls; serving goes on
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
        """A slot of each piece that runs uncompiled for now."""
        return {slot.fingerprint: slot for slot in self.slots}

    def wait_until_locked(self) -> None:
        """Until other processes can see which pieces jobs of this one are compiling."""
        for job in self._jobs():
            job.outcome(time.monotonic() + _BEGIN_S)

    def finish(self) -> None:
        """Wait for what jobs of this process compile, and leave it to others."""
        for job in self._jobs():
            job.ended(math.inf)

    def _jobs(self) -> list[Job]:
        return [slot.job for slot in self.slots if slot.job is not None]


def compile_pieces(
    pieces: Mapping[Fingerprint, Piece],
    compiler: PieceCompiler,
    cache: PieceCache,
    captured: Captured,
    uses: Counter[Fingerprint] | None,
) -> dict[Fingerprint, Run]:
    """Compile what is new among pieces, inside their capture.

    Args:
        pieces: one of each distinct piece.
        compiler: compiles them.
        cache: compiled pieces so far; grows.
        captured: the graph that they are cut from.
        uses: how often each runs in a step: seldom used ones may then be compiled later; None: all now.

    Returns:
        What runs each piece: its code, or its slot while that is compiled beside serving.

    Raises:
        CompileError: the compiler failed.
    """
    new = {found: piece for found, piece in pieces.items() if found not in cache.compiled}
    cache.order += new
    wanted = {found: piece for found, piece in new.items() if found not in cache.pending and not cache.load(found)}
    compilation = _Compilation(compiler, cache, captured)
    later: dict[Fingerprint, Piece] = {}
    if uses is not None and isinstance(compiler, StoringCompiler):
        chosen = choose_deferred(uses, wanted)
        later = {found: wanted.pop(found) for found in new if found in chosen and compilation.may_defer(found)}
    compilation.compile(wanted)
    # Asked last: a fork takes with it what compiling the others has loaded.
    if later and not compilation.defer(later):
        compilation.compile(later)
    runners: dict[Fingerprint, Run] = {**cache.pending, **cache.compiled}
    for found in compilation.local:  # it relies on relations between sizes that only this capture has written down
        del cache.compiled[found]
    return {found: runners[found] for found in pieces}


class _Compilation:
    """Compiles pieces of one capture into a cache, each in one process of all that use the store.

    Every process takes the locks of the pieces that nobody is at, compiles them, and puts them into the store; then it
    waits for the others. So do forks of this process, one a core, on Linux CPUs. Pieces for a GPU are compiled here,
    one after the other (Triton compiles their kernels side by side). Whatever goes wrong in a fork, its pieces are
    compiled here.

    Attributes:
        local: pieces that hold in this capture alone.
    """

    def __init__(self, compiler: PieceCompiler, cache: PieceCache, captured: Captured) -> None:
        self.compiler = compiler
        self.cache = cache
        self.captured = captured
        self.local: list[Fingerprint] = []

    def compile(self, pieces: Mapping[Fingerprint, Piece]) -> None:
        """Compile pieces.

        Raises:
            CompileError: the compiler failed.
        """
        pieces = dict(sorted(pieces.items(), key=lambda pair: -len(pair[1].gm.graph.nodes)))  # the largest first
        workers = _workers(len(pieces), _cores())
        channel = self._channel(pieces, several=True) if workers > 1 else None
        jobs = []
        if channel is not None:
            work = functools.partial(self._work, pieces, channel)
            jobs = [Job.fork(work, nice=0) for _ in range(workers - 1)]
        with piece_progress(len(pieces)) as advance:
            try:
                start = time.monotonic()
                self._compile_free(pieces, channel or self.cache.store, 0, advance)
                deadline = time.monotonic() + (time.monotonic() - start) + _PATIENCE_S
                for job in jobs:
                    job.ended(deadline)
            finally:
                for job in jobs:
                    job.stop()
            self._compile_free(pieces, channel or self.cache.store, _WAIT_S, advance)
        ours = sum(len(outcome.facts.get("compiled", ())) for job in jobs if (outcome := job.outcome()))
        self.cache.count += ours
        if channel is not None:
            channel.store.counts.update({"piece stored": ours, "piece hits": -ours})

    def may_defer(self, found: Fingerprint) -> bool:
        """Whether a piece may be compiled later: one whose compilation was begun and abandoned is compiled now."""
        store = self.cache.store
        return store is None or not found.stable or not store.abandoned(found.digest)

    def defer(self, pieces: Mapping[Fingerprint, Piece]) -> bool:
        """Begin to compile pieces in a fork while this process serves; returns whether that can be done."""
        channel = self._channel(pieces, several=False)
        if channel is None:
            return False
        job = Job.fork(functools.partial(self._work_beside, pieces, channel))
        self.cache.slots += [PieceSlot(found, piece.gm.forward, channel, job) for found, piece in pieces.items()]
        return True

    def _channel(self, pieces: Mapping[Fingerprint, Piece], *, several: bool) -> PieceStore | None:
        """The store by which forks hand pieces over; None when they are not to be compiled in forks."""
        compiler = self.compiler
        if sys.platform != "linux" or not isinstance(compiler, StoringCompiler):
            return None
        if not compiler.forks([_inputs(piece) for piece in pieces.values()], several=several):
            return None
        channel = self.cache.channel(compiler)
        return channel if channel is not None and all(map(channel.takes, pieces)) else None

    def _compile_free(
        self, pieces: Mapping[Fingerprint, Piece], store: PieceStore | None, wait_s: float, advance: Callable[[], None]
    ) -> None:
        """Load or compile those pieces that are left and whose locks can be had; after waiting, all of them."""
        for found, piece in pieces.items():
            if found in self.cache.compiled:
                continue
            kept = store if store is not None and store.takes(found) else None
            with kept.lock(found.digest, wait_s) if kept is not None else contextlib.nullcontext(True) as held:
                if held or wait_s:
                    run = kept.load(found.digest) if kept is not None else None
                    self.cache.compiled[found] = run or self._compile(found, piece, kept)
                    advance()

    def _compile(self, found: Fingerprint, piece: Piece, store: PieceStore | None) -> Run:
        """Compile a piece in this process, and store it."""
        before = len(self._guards())
        artifact = None
        try:
            if store is not None:
                run, artifact = store.compiler.compile_and_store(piece.gm, _inputs(piece))
            else:
                run = self.compiler.compile(piece.gm, _inputs(piece))
        except Exception as exc:
            if is_restart(exc):
                raise
            raise CompileError(f"{self.compiler.name} can't compile piece {found.digest[:12]}: {why(exc)}") from exc
        self.cache.count += 1
        address = found.digest
        if len(self._guards()) > before:
            self.local.append(found)
            relations = repr([str(guard.expr) for guard in self._guards()])
            address = f"{address}-{hashlib.sha256(relations.encode()).hexdigest()}"
            self.cache.addresses[found] = address
        if store is not None and artifact is not None:
            store.keep(address, artifact, piece.gm)
        return run

    def _guards(self) -> Sequence[Any]:
        """The relations between sizes that the capture has written down so far."""
        return self.captured.fake_mode.shape_env.guards if self.captured.fake_mode.shape_env else []

    # -- in forks --------------------------------------------------------------------------------------------

    def _work(self, pieces: Mapping[Fingerprint, Piece], channel: PieceStore, say: Say) -> None:
        """Compile pieces whose locks can be had, beside this process, which does the same."""
        compiled = []
        for found, piece in pieces.items():
            with channel.lock(found.digest, 0) as held:
                if held and not channel.has(found.digest) and self._compile_for_others(found, piece, channel):
                    compiled.append(found.digest)
        say(compiled=compiled)

    def _work_beside(self, pieces: Mapping[Fingerprint, Piece], channel: PieceStore, say: Say) -> None:
        """Compile pieces while this process serves, but for those that another process compiles or has stored. Their
        locks are held from the beginning until each is stored."""
        with contextlib.ExitStack() as stack:
            ours: dict[Fingerprint, contextlib.ExitStack] = {}
            for found in pieces:
                lock = stack.enter_context(contextlib.ExitStack())
                if not lock.enter_context(channel.lock(found.digest, _GLANCE_S)) or channel.has(found.digest):
                    continue
                ours[found] = lock
                if channel.scratch is None:  # others may start with the graph
                    channel.keep_graph(found.digest, pieces[found].gm)
            say(compiled=[found.digest for found in ours])
            for found, lock in ours.items():
                with lock:
                    self._compile_for_others(found, pieces[found], channel)

    def _compile_for_others(self, found: Fingerprint, piece: Piece, channel: PieceStore) -> bool:
        """Compile a piece, and store it if its compilation writes down no relations between sizes, of which this
        process's capture would not know; returns whether it is stored."""
        before = len(self._guards())
        artifact = channel.compiler.compile_to_bytes(piece.gm, _inputs(piece))
        stores = len(self._guards()) == before and not orphaned()
        if stores:
            channel.keep(found.digest, artifact, piece.gm)
        return stores


def _inputs(piece: Piece) -> list[Any]:
    """A piece's inputs, as for `PieceCompiler.compile`."""
    return [node.meta["example_value"] for node in piece.gm.graph.nodes if node.op == "placeholder"]


def _workers(pieces: int, cores: int) -> int:
    """How many processes to compile in.

    A piece alone already keeps two cores busy at times, as Inductor compiles its kernels side by side, and every
    process has its own first piece to get over. On 2 cores, 3 pieces took 4.8 s in one process and 5.1 s in two, 4
    pieces the same in both, 11 pieces 13 % less in two.
    """
    return 1 if cores <= 2 and pieces <= 4 else min(pieces, cores)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
