"""Compiles the distinct pieces of a capture, in this process, in forks of it, or in a helper of the compiler."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glowplug.background.job import Job, Say, orphaned
from glowplug.compilers.base import PieceCompiler, StoringCompiler
from glowplug.errors import CompileError
from glowplug.graph.capture import Captured, is_restart, outside_trace, resumed
from glowplug.graph.carried import unpack
from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.shapes import add_guards, pickled_guards
from glowplug.graph.split import Piece
from glowplug.program.handing_over import hand_over, taken_ahead
from glowplug.program.piece_store import PieceStore, Run
from glowplug.program.pieces import HandedOver, PieceCache
from glowplug.program.slots import PieceSlot, choose_deferred
from glowplug.reasons import why
from glowplug.runtime.progress import piece_progress
from glowplug.store.store import LOCK_TIMEOUT_S, ArtifactStore

logger = logging.getLogger("glowplug")

_PATIENCE_S = 60.0
"""How much longer than this process a fork may take before its pieces are compiled here."""
_BRIEFLY_S = 0.1
"""How long to wait for a lock that another process may hold only to see whether it is free."""
_POLL_S = 0.02
"""How often to look for pieces that forks have finished."""


def compile_pieces(
    pieces: Mapping[Fingerprint, Piece],
    compiler: PieceCompiler,
    cache: PieceCache,
    captured: Captured,
    uses: Counter[Fingerprint] | None,
    meanwhile: Callable[[], None] | None = None,
) -> dict[Fingerprint, Run]:
    """Compile the distinct pieces that `cache` does not have yet, inside their capture.

    Args:
        pieces: the distinct pieces.
        compiler: compiles them.
        cache: receives them.
        captured: the capture.
        uses: how often each runs in a step, so that seldom used ones can be deferred; None compiles all now.
        meanwhile: called in this process while forks compile all pieces; not called if none do.

    Returns:
        For each piece its compiled code, or its slot if it is deferred.

    Raises:
        CompileError: the compiler failed.
    """
    new = {key: piece for key, piece in pieces.items() if key not in cache.compiled}
    cache.order += new
    asked = cache.ahead.pieces if cache.ahead is not None else frozenset()
    found = {key for key in new if key in cache.pending or (key not in asked and cache.load(key))}
    wanted = {key: piece for key, piece in new.items() if key not in found}
    compilation = _Compilation(compiler, cache, captured)
    deferred: dict[Fingerprint, Piece] = {}
    if uses is not None and isinstance(compiler, StoringCompiler):
        chosen = choose_deferred(uses, wanted)
        may_defer = getattr(compiler, "may_defer", None)
        if may_defer is None or may_defer([_inputs(piece) for piece in wanted.values()]):
            deferred = {key: wanted.pop(key) for key in new if key in chosen and compilation.may_defer(key)}
    compilation.compile(wanted, meanwhile)
    # Fork last, so that the child inherits the modules loaded while compiling the other pieces.
    if deferred and not compilation.defer(deferred):
        compilation.compile(deferred)
    runners: dict[Fingerprint, Run] = {**cache.pending, **cache.compiled}
    for key in compilation.local:
        del cache.compiled[key]
    return {key: runners[key] for key in pieces}


def compile_ahead(
    pieces: Mapping[Fingerprint, Piece], compiler: PieceCompiler, cache: PieceCache, captured: Captured
) -> None:
    """Let a helper compile pieces that a later capture is expected to have, if the compiler has one. Then
    `compile_pieces` takes over those that it has."""
    wanted = {key: piece for key, piece in pieces.items() if key not in cache.compiled and not cache.load(key)}
    cache.ahead = hand_over(compile_carried, _largest_first(wanted), compiler, cache, captured)


class _Compilation:
    """Compiles the pieces of one capture into a cache; each piece is compiled by one of the processes using the store.

    Each process locks the pieces that no other process is compiling, compiles them, and stores them; then it waits for
    the rest. On Linux this process forks, one process per core, and its forks do the same. If a fork fails, its pieces
    are compiled here.

    Attributes:
        local: pieces whose compilation added guards on sizes, so that they are valid in this capture only.
        jobs: the forks that compile for this capture, as long as it has not noted what they did.
    """

    def __init__(self, compiler: PieceCompiler, cache: PieceCache, captured: Captured) -> None:
        self.compiler = compiler
        self.cache = cache
        self.captured = captured
        self.local: list[Fingerprint] = []
        self.jobs: list[Job] = []

    def compile(self, pieces: Mapping[Fingerprint, Piece], meanwhile: Callable[[], None] | None = None) -> None:
        """Compile pieces, in several processes if that is worth it. Then this one does `meanwhile` first."""
        pieces = _largest_first(pieces)
        handed_over = taken_ahead(pieces, self.cache, self.captured)
        if handed_over is None:
            handed_over = hand_over(compile_carried, pieces, self.compiler, self.cache, self.captured)
        jobs, beside, channel = self._begin(pieces, handed_over, alone=meanwhile is not None)
        self.jobs = list(jobs)
        compile_free = functools.partial(self._compile_free, pieces, channel or self.cache.store)
        with piece_progress(len(pieces)) as advance:
            try:
                start = time.monotonic()
                if jobs and meanwhile is not None:
                    with outside_trace():
                        meanwhile()
                if handed_over is None:
                    compile_free(0, advance)
                else:  # in a thread, during the trace, both would wait for each other
                    getattr(self.compiler, "warm_up_loading", lambda: None)()
                deadline = time.monotonic() + (time.monotonic() - start) + _PATIENCE_S
                # Loading a piece may take as long as a third of its compilation: load each as soon as it is there.
                while time.monotonic() < deadline and not all(job.ended() for job in jobs):
                    time.sleep(_POLL_S)
                    compile_free(0, advance, stored=handed_over is not None)
            finally:
                for job in (*jobs, *beside):
                    job.stop()
            compile_free(LOCK_TIMEOUT_S, advance)
        if channel is not None:
            self._take_over(pieces, channel, advance)

    def _begin(
        self, pieces: Mapping[Fingerprint, Piece], handed_over: HandedOver | None, *, alone: bool
    ) -> tuple[list[Job], list[Job], PieceStore | None]:
        """Begin to compile pieces in other processes, `alone` without this one. Returns the jobs, those that compile
        what no piece contains, and the store that gets the pieces."""
        if handed_over is not None:
            channel: PieceStore | None = handed_over.channel
            missing = {key: piece for key, piece in pieces.items() if key not in handed_over.pieces}
            forks = bool(missing) and self._channel(missing, several=True, given=channel) is not None
            shares: list[Mapping[Fingerprint, Piece]] = [missing] * forks
        else:
            workers = _workers(len(pieces), _cores())
            channel = self._channel(pieces, several=True) if workers > 1 else None
            shares = [pieces] * (workers - (not alone))
        jobs, beside = self.fork(shares, channel) if channel is not None and shares else ([], [])
        return ([*jobs, handed_over.job] if handed_over is not None else jobs), beside, channel

    def fork(self, shares: Sequence[Mapping[Fingerprint, Piece]], channel: PieceStore) -> tuple[list[Job], list[Job]]:
        """Begin to compile pieces, one fork of this process for each share, which may overlap. Returns the forks, and
        those that compile what no piece contains."""
        jobs = [Job.fork(functools.partial(self._work, share, channel), nice=0) for share in shares]
        beside_forks = getattr(self.compiler, "beside_forks", None)
        pieces = {fingerprint: piece.gm for share in shares for fingerprint, piece in share.items()}
        return jobs, [] if beside_forks is None else beside_forks(list(pieces.values()))

    def _take_over(self, pieces: Mapping[Fingerprint, Piece], store: PieceStore, advance: Callable[[], None]) -> None:
        """Note what forks have done, and load what they compiled with guards, which this capture takes over."""
        for job in list(self.jobs):
            outcome = job.outcome()
            if outcome is None:
                continue
            self.jobs.remove(job)
            if outcome.reason is not None:
                logger.debug("glowplug: pieces were not compiled in a fork: %s", outcome.reason)
            guarded = outcome.facts.get("guarded", {})
            done = {*outcome.facts.get("compiled", ()), *guarded}
            ours = sum(fingerprint.digest in done for fingerprint in pieces)
            self.cache.count += ours
            store.store.counts.update({"piece stored": ours, "piece hits": -ours})
            for fingerprint in pieces:
                address, guards = guarded.get(fingerprint.digest, (None, ()))
                if address is None or fingerprint in self.cache.compiled or not add_guards(self.captured, guards):
                    continue
                run = store.load(address)
                if run is not None:
                    self.cache.compiled[fingerprint] = run
                    self.local.append(fingerprint)
                    self.cache.addresses[fingerprint] = address
                    advance()

    def may_defer(self, fingerprint: Fingerprint) -> bool:
        """Whether a piece may be deferred. If an earlier job left it unfinished, it is compiled now."""
        store = self.cache.store
        return store is None or not fingerprint.stable or not store.abandoned(fingerprint.digest)

    def defer(self, pieces: Mapping[Fingerprint, Piece]) -> bool:
        """Start compiling pieces in a fork while the model serves; returns whether a fork can compile them."""
        channel = self._channel(pieces, several=False)
        if channel is None:
            return False
        job = Job.fork(functools.partial(self._work_on_deferred, pieces, channel))
        self.cache.slots += [PieceSlot(key, piece.gm.forward, channel, job) for key, piece in pieces.items()]
        return True

    def _channel(
        self, pieces: Mapping[Fingerprint, Piece], *, several: bool, given: PieceStore | None = None
    ) -> PieceStore | None:
        """The store through which forks hand over pieces, the given one if there is one; None if the pieces must be
        compiled in this process."""
        compiler = self.compiler
        if sys.platform != "linux" or not isinstance(compiler, StoringCompiler):
            return None
        if not compiler.forks([_inputs(piece) for piece in pieces.values()], several=several):
            return None
        channel = given or self.cache.channel(compiler)
        return channel if channel is not None and all(map(channel.takes, pieces)) else None

    def _compile_free(
        self,
        pieces: Mapping[Fingerprint, Piece],
        store: PieceStore | None,
        wait_s: float,
        advance: Callable[[], None],
        *,
        stored: bool = False,
    ) -> None:
        """Load or compile the remaining pieces that no other process has locked; with a `wait_s`, all of them; with
        `stored`, only those that are there."""
        for fingerprint, piece in pieces.items():
            if fingerprint in self.cache.compiled:
                continue
            if stored and (store is None or not store.arrived(fingerprint.digest)):
                continue
            shared = store if store is not None and store.takes(fingerprint) else None
            lock = shared.lock(fingerprint.digest, wait_s) if shared is not None else contextlib.nullcontext(True)
            with lock as locked:
                if shared is not None:
                    self._take_over(pieces, shared, advance)
                if (locked or wait_s) and fingerprint not in self.cache.compiled:
                    run = shared.load(fingerprint.digest) if shared is not None else None
                    self.cache.compiled[fingerprint] = run or self._compile(fingerprint, piece, shared)
                    advance()

    def _compile(self, fingerprint: Fingerprint, piece: Piece, store: PieceStore | None) -> Run:
        """Compile a piece in this process and store it."""
        address = fingerprint.digest
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
            raise CompileError(f"{self.compiler.name} can't compile piece {address[:12]}: {why(exc)}") from exc
        self.cache.count += 1
        if len(self._guards()) > before:
            self.local.append(fingerprint)
            address = self.cache.addresses[fingerprint] = self._address(address)
        if store is not None and artifact is not None:
            store.keep(address, artifact, piece.gm)
        return run

    def _address(self, digest: str) -> str:
        """The address of a piece that is valid only with the guards collected so far."""
        relations = repr([str(guard.expr) for guard in self._guards()])
        return f"{digest}-{hashlib.sha256(relations.encode()).hexdigest()}"

    def _guards(self) -> Sequence[Any]:
        """The guards on sizes that the capture has collected so far."""
        environment = self.captured.fake_mode.shape_env
        return environment.guards if environment and not getattr(self.compiler, "drops_guards", False) else []

    # -- in forks --------------------------------------------------------------------------------------------

    def _work(self, pieces: Mapping[Fingerprint, Piece], channel: PieceStore, say: Say) -> None:
        """Compile pieces that no other process has locked, in parallel with the parent, which does the same."""
        compiled: list[str] = []
        guarded: dict[str, tuple[str, list[str]]] = {}
        begun = len(self._guards())
        with contextlib.ExitStack() as held:  # the locks of pieces that the parent must take over with their guards
            for fingerprint, piece in pieces.items():
                digest = fingerprint.digest
                with contextlib.ExitStack() as lock:
                    if not lock.enter_context(channel.lock(digest, 0)) or channel.has(digest):
                        continue
                    address = self._compile_into(channel, digest, piece)
                    if address == digest:
                        compiled.append(digest)
                    elif address is not None:
                        guarded[digest] = address, pickled_guards(self._guards()[begun:])
                        held.push(lock.pop_all())
            say(compiled=compiled, guarded=guarded)

    def _work_on_deferred(self, pieces: Mapping[Fingerprint, Piece], channel: PieceStore, say: Say) -> None:
        """Compile deferred pieces that no other process is compiling or has stored. Each stays locked from the start
        until it is stored, so that other processes can see that it is on its way."""
        with contextlib.ExitStack() as stack:
            locks: dict[str, tuple[Piece, contextlib.ExitStack]] = {}
            for fingerprint, piece in pieces.items():
                digest = fingerprint.digest
                lock = stack.enter_context(contextlib.ExitStack())
                if not lock.enter_context(channel.lock(digest, _BRIEFLY_S)) or channel.has(digest):
                    continue
                locks[digest] = piece, lock
                if channel.scratch is None:  # other processes may start with the graph
                    channel.keep_graph(digest, piece.gm)
            say(compiled=list(locks))
            for digest, (piece, lock) in locks.items():
                with lock:
                    self._compile_into(channel, digest, piece, guarded=False)

    def _compile_into(self, channel: PieceStore, digest: str, piece: Piece, *, guarded: bool = True) -> str | None:
        """Compile a piece and store it. Returns its address: its digest, unless its compilation added guards, which the
        parent's capture lacks. None if it was not stored: nobody waits for it any more, or it must not be `guarded`."""
        before = len(self._guards())
        artifact = channel.compiler.compile_to_bytes(piece.gm, _inputs(piece))
        has_guards = len(self._guards()) > before
        if orphaned() or (has_guards and not guarded):
            return None
        address = self._address(digest) if has_guards else digest
        channel.keep(address, artifact, piece.gm)
        return address


def compile_carried(
    say: Say,
    compiler: StoringCompiler,
    graphs: bytes,
    digests: Sequence[str],
    specialise: bool,
    store: ArtifactStore,
    environment: str,
) -> None:
    """In a helper: compile carried pieces in forks, and say what each fork would say to the process that traced.

    Args:
        say: reports what was compiled.
        compiler: compiles them.
        graphs: the pieces, from `carry`.
        digests: their digests.
        specialise: see `resumed`.
        store: receives them.
        environment: see `PieceStore`.
    """
    mode, modules = unpack(graphs)
    pieces = [(Fingerprint(digest), Piece(gm, (), ())) for digest, gm in zip(digests, modules, strict=True)]
    forks = min(len(pieces), _cores())
    with resumed(mode, specialise) as captured:
        compilation = _Compilation(compiler, PieceCache(), captured)
        shares = [dict(pieces[number::forks]) for number in range(forks)]
        jobs, beside = compilation.fork(shares, PieceStore(store, compiler, environment))
        outcomes = [job.outcome(math.inf) for job in jobs]
    reasons = [outcome.reason for outcome in outcomes if outcome is not None and outcome.reason is not None]
    facts = [outcome.facts for outcome in outcomes if outcome is not None]
    say(
        "; ".join(dict.fromkeys(reasons)) or None,
        compiled=[digest for each in facts for digest in each.get("compiled", ())],
        guarded={digest: known for each in facts for digest, known in each.get("guarded", {}).items()},
    )
    for job in beside:
        job.outcome(math.inf)


def _largest_first(pieces: Mapping[Fingerprint, Piece]) -> dict[Fingerprint, Piece]:
    return dict(sorted(pieces.items(), key=lambda pair: -len(pair[1].gm.graph.nodes)))


def _inputs(piece: Piece) -> list[Any]:
    return [node.meta["example_value"] for node in piece.gm.graph.nodes if node.op == "placeholder"]


def _workers(pieces: int, cores: int) -> int:
    """How many processes to compile in.

    One piece already keeps two cores busy at times, as Inductor compiles its kernels in parallel, and the first piece
    of each process takes longer. On 2 cores, 3 pieces took 4.8 s in one process and 5.1 s in two; 4 pieces took the
    same; 11 pieces took 13 % less in two.
    """
    return 1 if cores <= 2 and pieces <= 4 else min(pieces, cores)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
