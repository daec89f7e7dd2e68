"""The compiled pieces of one model: each distinct one compiled once, or taken from a store."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glowplug.compilers.base import PieceCompiler, StoringCompiler
from glowplug.compilers.fork import reap
from glowplug.compilers.parallel import Job, compile_jobs
from glowplug.errors import CompileError
from glowplug.forks import make_lock
from glowplug.graph.capture import Captured, is_restart
from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.split import Piece
from glowplug.program.end_makers import ForkMaker
from glowplug.program.ends import Ends, choose_ends
from glowplug.program.piece_store import PieceStore
from glowplug.progress import piece_progress
from glowplug.reasons import why
from glowplug.report import Report

_WAIT_S = 600.0
"""How long to wait for another process that compiles the same piece."""


@dataclass
class PieceCache:
    """Compiled pieces of one model, by fingerprint: programs for further signatures reuse them.

    Attributes:
        compiled: the pieces.
        order: the fingerprint of each distinct piece, those of `ends` too.
        ends: pieces that run uncompiled for now.
        store: where to look for compiled pieces, and to keep them.
        addresses: what the store knows a piece by that holds only with relations between sizes which its compilation
            wrote down; a program that keeps to them may use it.
        count: how many pieces were compiled here.
    """

    compiled: dict[Fingerprint, Callable[..., Sequence[Any]]] = field(default_factory=dict)
    order: list[Fingerprint] = field(default_factory=list)
    ends: list[Ends] = field(default_factory=list)
    store: PieceStore | None = None
    addresses: dict[Fingerprint, str] = field(default_factory=dict)
    count: int = 0
    lock: Any = field(default_factory=make_lock)

    def poll(self, report: Report, deadline: float | None = None) -> None:
        """Take what was compiled beside serving; wait for it until `deadline` (`time.monotonic()`), if given."""
        if not self.lock.acquire(timeout=max(deadline - time.monotonic(), 0) if deadline is not None else 0):
            return  # another thread compiles pieces, or polls; serving goes on
        try:
            for ends in self.ends:
                self.compiled |= ends.poll(deadline)
                report.compiled_pieces += ends.compiled
                ends.compiled = 0
            self.ends = [ends for ends in self.ends if ends.pending]
            report.pending_pieces = self.pending
            reap()
        finally:
            self.lock.release()

    @property
    def pending(self) -> int:
        """How many pieces run uncompiled for now."""
        return sum(len(ends.runners) for ends in self.ends)

    def wait_until_locked(self) -> None:
        """Until other processes can see which pieces forks of this one are compiling."""
        for maker in self._forks():
            maker.wait_until_locked()

    def finish(self) -> None:
        """Wait for what forks of this process compile, and leave it to others."""
        for maker in self._forks():
            maker.finish()

    def _forks(self) -> list[ForkMaker]:
        return [ends.maker for ends in self.ends if isinstance(ends.maker, ForkMaker)]


def compile_pieces(
    pieces: Mapping[Fingerprint, Piece],
    compiler: PieceCompiler,
    cache: PieceCache,
    captured: Captured,
    uses: Counter[Fingerprint] | None,
) -> tuple[dict[Fingerprint, Callable[..., Any]], Ends | None]:
    """Compile what is new among pieces, inside their capture.

    Args:
        pieces: one of each distinct piece.
        compiler: compiles them.
        cache: compiled pieces so far; grows.
        captured: the graph that they are cut from.
        uses: how often each runs in a step: seldom used ones may then be compiled later; None: all now.

    Returns:
        The callable of each piece; and those that are compiled beside serving, if any.

    Raises:
        CompileError: the compiler failed.
    """
    new = {found: piece for found, piece in pieces.items() if found not in cache.compiled}
    cache.order += new
    wanted = new
    if cache.store is not None:
        wanted = {found: piece for found, piece in new.items() if not _loaded(found, cache.store, cache)}
    jobs = {found: _job(found, piece, cache.store) for found, piece in wanted.items()}
    later = choose_ends(uses, wanted) if uses is not None and isinstance(compiler, StoringCompiler) else set()
    if cache.store is not None:
        later = {found for found in later if not (found.stable and cache.store.refuses(found.digest))}
    deferred = {found: jobs.pop(found) for found in later}
    local = _compile_new(jobs, compiler, cache, captured)
    ends = None
    # Asked last: a fork takes with it what compiling the others has loaded.
    if deferred and isinstance(compiler, StoringCompiler) and compiler.forks([j.inputs for j in deferred.values()]):
        for found, job in deferred.items():
            if cache.store is not None and found.stable:  # others may start with it, too
                cache.store.keep_graph(found.digest, job.piece)
        maker = ForkMaker(compiler, deferred, lambda: len(_guards(captured)), cache.store)
        ends = Ends({found: job.piece.forward for found, job in deferred.items()}, maker)
        cache.ends.append(ends)
    else:
        local += _compile_new(deferred, compiler, cache, captured)
    runners = {found: cache.compiled[found] for found in pieces if found in cache.compiled}
    for found in local:  # it relies on relations between sizes that only this capture has written down
        del cache.compiled[found]
    return {**runners, **(ends.runners if ends is not None else {})}, ends


def _job(found: Fingerprint, piece: Piece, store: PieceStore | None) -> Job:
    inputs = [node.meta["example_value"] for node in piece.gm.graph.nodes if node.op == "placeholder"]
    if store is None or not found.stable:
        return Job(piece.gm, inputs)
    keep = functools.partial(store.keep, found.digest, piece=piece.gm)
    lock, stored = functools.partial(store.lock, found.digest), functools.partial(store.has, found.digest)
    return Job(piece.gm, inputs, lock, keep, stored, functools.partial(store.refuse, found.digest))


def _compile_new(
    jobs: Mapping[Fingerprint, Job], compiler: PieceCompiler, cache: PieceCache, captured: Captured
) -> list[Fingerprint]:
    """Compile pieces into the cache, each in one process of all that use the store; returns those that hold in this
    capture alone."""
    store = cache.store
    if store is None:
        return _compile_jobs(jobs, compiler, cache, captured)
    local: list[Fingerprint] = []
    with contextlib.ExitStack() as locks:
        held = {found: locks.enter_context(job.lock(0)) for found, job in jobs.items()}
        missing = {found: job for found, job in jobs.items() if held[found] and not _loaded(found, store, cache)}
        local += _compile_jobs(missing, compiler, cache, captured)
    for found in [found for found in jobs if found not in cache.compiled]:
        with jobs[found].lock(_WAIT_S):  # its maker is done, or gone
            if not _loaded(found, store, cache):
                local += _compile_jobs({found: jobs[found]}, compiler, cache, captured)
    return local


def _loaded(found: Fingerprint, store: PieceStore, cache: PieceCache) -> bool:
    run = store.load(found.digest) if found.stable else None
    if run is not None:
        cache.compiled[found] = run
    return run is not None


def _compile_jobs(
    jobs: Mapping[Fingerprint, Job], compiler: PieceCompiler, cache: PieceCache, captured: Captured
) -> list[Fingerprint]:
    """Compile pieces into the cache; returns those that hold in this capture alone.

    Raises:
        CompileError: the compiler failed.
    """
    local: list[Fingerprint] = []
    with piece_progress(len(jobs)) as advance:
        results = compile_jobs(compiler, list(jobs.values()), lambda: len(_guards(captured)), advance)
    for found, result in zip(jobs, results, strict=False):
        if result.error is not None:
            if is_restart(result.error):
                raise result.error
            what = f"{compiler.name} can't compile piece {found.digest[:12]}: {why(result.error)}"
            raise CompileError(what) from result.error
        if result.run is None:  # given up, as another piece failed
            continue
        cache.compiled[found] = result.run
        cache.count += 1
        if result.local:
            local.append(found)
        if result.artifact is not None and cache.store is not None:
            address = found.digest
            if result.local:
                relations = repr([str(guard.expr) for guard in _guards(captured)])
                address = f"{address}-{hashlib.sha256(relations.encode()).hexdigest()}"
                cache.addresses[found] = address
            cache.store.keep(address, result.artifact, jobs[found].piece)
    return local


def _guards(captured: Captured) -> Sequence[Any]:
    """The relations between sizes that the capture has written down so far."""
    return captured.fake_mode.shape_env.guards if captured.fake_mode.shape_env else []
