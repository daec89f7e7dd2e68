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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx

from glowplug.background.job import Job, Say, orphaned
from glowplug.compilers.base import PieceCompiler, StoringCompiler
from glowplug.errors import CompileError
from glowplug.forks import Scratch, make_lock
from glowplug.graph.capture import Captured, is_restart
from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.split import Piece
from glowplug.program.piece_store import PieceStore, Run
from glowplug.program.slots import Deferred, PieceSlot, choose_deferred
from glowplug.progress import piece_progress
from glowplug.reasons import why
from glowplug.report import Report

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
        deferred: pieces that run uncompiled for now.
        store: where to look for compiled pieces, and to keep them.
        addresses: what the store knows a piece by that holds only with relations between sizes which its compilation
            wrote down; a program that keeps to them may use it.
        count: how many pieces were compiled here.
    """

    compiled: dict[Fingerprint, Run] = field(default_factory=dict)
    order: list[Fingerprint] = field(default_factory=list)
    deferred: list[Deferred] = field(default_factory=list)
    store: PieceStore | None = None
    addresses: dict[Fingerprint, str] = field(default_factory=dict)
    count: int = 0
    lock: Any = field(default_factory=make_lock)
    _temporary: PieceStore | None = None

    def channel(self, compiler: PieceCompiler) -> PieceStore | None:
        """The store through which jobs of this process hand pieces over: the model's, or else a temporary one. None
        where there can be none."""
        if self.store is not None and self.store.writable:
            return self.store
        if self._temporary is None or self._temporary.lost:
            self._temporary = PieceStore.temporary(compiler) if isinstance(compiler, StoringCompiler) else None
        return self._temporary

    def load(self, found: Fingerprint) -> bool:
        """Take a piece from the store; returns whether it was there."""
        run = self.store.load(found.digest) if self.store is not None and found.stable else None
        if run is not None:
            self.compiled[found] = run
        return run is not None

    def poll(self, report: Report, deadline: float | None = None) -> None:
        """Take what was compiled beside serving; wait for it until `deadline` (`time.monotonic()`), if given."""
        if not self.lock.acquire(timeout=max(deadline - time.monotonic(), 0) if deadline is not None else 0):
            return  # another thread compiles pieces, or polls; serving goes on
        try:
            for deferred in self.deferred:
                deferred.poll(deadline)
                self.compiled |= {s.fingerprint: s.compiled for s in deferred.slots if s.compiled is not None}
                report.compiled_pieces += 0 if deferred.pending else deferred.compiled
            self.deferred = [deferred for deferred in self.deferred if deferred.pending]
            report.pending_pieces = len(self.slots)
        finally:
            self.lock.release()

    @property
    def slots(self) -> dict[Fingerprint, PieceSlot]:
        """The slots of pieces that run uncompiled for now."""
        return {slot.fingerprint: slot for deferred in self.deferred for slot in deferred.slots}

    def wait_until_locked(self) -> None:
        """Until other processes can see which pieces jobs of this one are compiling."""
        for job in self._jobs():
            job.outcome(time.monotonic() + _BEGIN_S)

    def finish(self) -> None:
        """Wait for what jobs of this process compile, and leave it to others."""
        for job in self._jobs():
            job.ended(math.inf)

    def _jobs(self) -> list[Job]:
        return [deferred.job for deferred in self.deferred if deferred.job is not None]


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
    wanted = {found: piece for found, piece in new.items() if found not in cache.slots and not cache.load(found)}
    compilation = _Compilation(compiler, cache, captured)
    tasks = {found: _Task.of(found, piece) for found, piece in wanted.items()}
    later = []
    if uses is not None and isinstance(compiler, StoringCompiler):
        chosen = choose_deferred(uses, wanted)
        later = [tasks.pop(found) for found in wanted if found in chosen and compilation.may_defer(found)]
    compilation.compile(list(tasks.values()))
    # Asked last: a fork takes with it what compiling the others has loaded.
    if later and not compilation.defer(later):
        compilation.compile(later)
    runners: dict[Fingerprint, Run] = {**cache.slots, **cache.compiled}
    for found in compilation.local:  # it relies on relations between sizes that only this capture has written down
        del cache.compiled[found]
    return {found: runners[found] for found in pieces}


@dataclass(frozen=True)
class _Task:
    """One distinct piece to compile, and its inputs, as for `PieceCompiler.compile`."""

    found: Fingerprint
    piece: fx.GraphModule
    inputs: Sequence[Any]

    @classmethod
    def of(cls, found: Fingerprint, piece: Piece) -> _Task:
        nodes = (node for node in piece.gm.graph.nodes if node.op == "placeholder")
        return cls(found, piece.gm, [node.meta["example_value"] for node in nodes])

    @property
    def digest(self) -> str:
        return self.found.digest


class _Compilation:
    """Compiles pieces of one capture into a cache.

    On Linux CPUs distinct pieces are compiled side by side: the process forks once a core, each fork takes pieces off a
    common list and puts them into the store, and this process, which takes pieces too, loads them. Pieces for a GPU are
    compiled here, one after the other (Triton compiles their kernels side by side). Whatever goes wrong in a fork, its
    pieces are compiled here.

    Attributes:
        local: pieces that hold in this capture alone.
    """

    def __init__(self, compiler: PieceCompiler, cache: PieceCache, captured: Captured) -> None:
        self.compiler = compiler
        self.cache = cache
        self.captured = captured
        self.local: list[Fingerprint] = []

    def compile(self, tasks: Sequence[_Task]) -> None:
        """Compile pieces, each in one process of all that use the store.

        Raises:
            CompileError: the compiler failed.
        """
        with contextlib.ExitStack() as locks:
            held = [task for task in tasks if locks.enter_context(self._lock(task, 0))]
            # Whoever held the lock before may have stored it.
            self._compile_held([task for task in held if not self.cache.load(task.found)])
        for task in tasks:
            if task.found not in self.cache.compiled:
                with self._lock(task, _WAIT_S):  # whoever compiles it is done, or gone
                    if not self.cache.load(task.found):
                        self._compile_held([task])

    def may_defer(self, found: Fingerprint) -> bool:
        """Whether a piece may be compiled later: one whose compilation was begun and abandoned is compiled now."""
        store = self.cache.store
        return store is None or not found.stable or not store.abandoned(found.digest)

    def defer(self, tasks: Sequence[_Task]) -> bool:
        """Begin to compile pieces in a fork while this process serves; returns whether that can be done."""
        channel = self._channel(tasks, several=False)
        if channel is None:
            return False
        job = Job.fork(functools.partial(self._work_beside, tasks, channel))
        slots = tuple(PieceSlot(task.found, task.piece.forward) for task in tasks)
        self.cache.deferred.append(Deferred(slots, channel, job))
        return True

    def _channel(self, tasks: Sequence[_Task], *, several: bool) -> PieceStore | None:
        """The store by which forks hand pieces over; None when they are not to be compiled in forks."""
        compiler = self.compiler
        if not isinstance(compiler, StoringCompiler):
            return None
        if not compiler.forks([task.inputs for task in tasks], several=several):
            return None
        channel = self.cache.channel(compiler)
        lasting = channel is not None and channel.scratch is None
        return None if lasting and not all(task.found.stable for task in tasks) else channel

    def _compile_held(self, tasks: Sequence[_Task]) -> None:
        with piece_progress(len(tasks)) as advance:
            workers = _workers(len(tasks), _cores())
            channel = self._channel(tasks, several=True) if workers > 1 else None
            if channel is not None:
                self._compile_side_by_side(tasks, channel, workers, advance)
            for task in tasks:
                if task.found not in self.cache.compiled:
                    if channel is None or not self._take(task, channel):
                        self._compile(task)
                    advance()

    def _compile_side_by_side(
        self, tasks: Sequence[_Task], channel: PieceStore, workers: int, advance: Callable[[], None]
    ) -> None:
        with Scratch("claims") as folder:
            jobs = [Job.fork(lambda _: self._work(_claims(tasks, folder), channel), nice=0) for _ in range(workers - 1)]
            try:
                start = time.monotonic()
                for task in _claims(tasks, folder):
                    self._compile(task)
                    advance()
                deadline = time.monotonic() + (time.monotonic() - start) + _PATIENCE_S
                for job in jobs:
                    job.ended(deadline)
            finally:
                for job in jobs:
                    job.stop()

    def _take(self, task: _Task, channel: PieceStore) -> bool:
        """Load what a fork has stored; returns whether that can be done."""
        run = channel.load(task.digest)
        if run is not None:
            self.cache.compiled[task.found] = run
            self.cache.count += 1
        return run is not None

    def _compile(self, task: _Task) -> None:
        """Compile a piece in this process, and store it."""
        before = len(self._guards())
        store = self.cache.store if task.found.stable else None
        artifact = None
        try:
            if store is not None:
                run, artifact = store.compiler.compile_and_store(task.piece, task.inputs)
            else:
                run = self.compiler.compile(task.piece, task.inputs)
        except Exception as exc:
            if is_restart(exc):
                raise
            raise CompileError(f"{self.compiler.name} can't compile piece {task.digest[:12]}: {why(exc)}") from exc
        self.cache.compiled[task.found] = run
        self.cache.count += 1
        address = task.digest
        if len(self._guards()) > before:
            self.local.append(task.found)
            relations = repr([str(guard.expr) for guard in self._guards()])
            address = f"{address}-{hashlib.sha256(relations.encode()).hexdigest()}"
            self.cache.addresses[task.found] = address
        if store is not None and artifact is not None:
            store.keep(address, artifact, task.piece)

    def _guards(self) -> Sequence[Any]:
        """The relations between sizes that the capture has written down so far."""
        return self.captured.fake_mode.shape_env.guards if self.captured.fake_mode.shape_env else []

    def _lock(self, task: _Task, timeout_s: float) -> AbstractContextManager[bool]:
        store = self.cache.store if task.found.stable else None
        return store.lock(task.digest, timeout_s) if store is not None else contextlib.nullcontext(True)

    # -- in forks --------------------------------------------------------------------------------------------

    def _work(self, tasks: Iterable[_Task], channel: PieceStore) -> None:
        """Compile pieces, and store them, but for those whose compilation writes down relations between sizes: this
        process's capture must know of them."""
        for task in tasks:
            before = len(self._guards())
            artifact = channel.compiler.compile_to_bytes(task.piece, task.inputs)
            if len(self._guards()) == before and not orphaned():
                channel.keep(task.digest, artifact, task.piece)

    def _work_beside(self, tasks: Sequence[_Task], channel: PieceStore, say: Say) -> None:
        """The same beside serving. It holds the locks of its pieces from the beginning until each is stored, and leaves
        alone what another process compiles, or has stored."""
        with contextlib.ExitStack() as stack:
            locks = [stack.enter_context(contextlib.ExitStack()) for _ in tasks]
            pairs = [
                (task, lock)
                for task, lock in zip(tasks, locks, strict=True)
                if lock.enter_context(channel.lock(task.digest, _GLANCE_S)) and not channel.has(task.digest)
            ]
            if channel.scratch is None:  # others may start with the graphs
                for task, _ in pairs:
                    channel.keep_graph(task.digest, task.piece)
            say(compiles=[task.digest for task, _ in pairs])
            for task, lock in pairs:
                with lock:
                    self._work([task], channel)


def _claims(tasks: Sequence[_Task], folder: Path) -> Iterator[_Task]:
    """Tasks that no other process has taken, the largest first."""
    for number, task in sorted(enumerate(tasks), key=lambda pair: -len(pair[1].piece.graph.nodes)):
        try:
            os.close(os.open(folder / str(number), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        yield task


def _workers(tasks: int, cores: int) -> int:
    """How many processes to compile in.

    A piece alone already keeps two cores busy at times, as Inductor compiles its kernels side by side, and every
    process has its own first piece to get over. On 2 cores, 3 pieces took 4.8 s in one process and 5.1 s in two, 4
    pieces the same in both, 11 pieces 13 % less in two.
    """
    return 1 if cores <= 2 and tasks <= 4 else min(tasks, cores)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
