"""The compiled pieces of one model: each distinct one compiled once, or taken from a store."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import fx

from glowplug.compilers.base import PieceCompiler, StoringCompiler
from glowplug.compilers.parallel import Job, compile_jobs
from glowplug.errors import CompileError
from glowplug.graph.capture import Captured, is_restart
from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.pickled import graph_from_bytes, graph_to_bytes
from glowplug.graph.split import Piece
from glowplug.program.ends import Ends, choose_ends
from glowplug.progress import piece_progress
from glowplug.report import Report

_WAIT_S = 600.0
"""How long to wait for another process that compiles the same piece."""


class Store(Protocol):
    """Where compiled pieces are kept; see `glowplug.store.ArtifactStore`."""

    def get(self, kind: str, key: str) -> bytes | None:
        """The payload of an artifact."""
        ...

    def put(self, kind: str, key: str, payload: bytes, about: str = "") -> None:
        """Keep one."""
        ...

    def note(self, problem: str) -> None:
        """Remember, and log once, what went wrong."""
        ...

    def drop(self, kind: str, key: str, why: str) -> None:
        """Forget one that is of no use."""
        ...

    def lock(self, kind: str, key: str, timeout_s: float) -> AbstractContextManager[bool]:
        """Hold its lock."""
        ...


@dataclass(frozen=True)
class PieceStore:
    """The pieces of a store that this process can use.

    Attributes:
        store: the store.
        compiler: makes pieces, and loads them.
        environment: whatever a piece's compilation depends on besides the piece.
    """

    store: Store
    compiler: StoringCompiler
    environment: str

    def key(self, digest: str) -> str:
        """The address of a piece with a fingerprint."""
        return hashlib.sha256(f"{self.environment}\n{digest}".encode()).hexdigest()

    def has(self, digest: str) -> bool:
        """Whether a piece is stored."""
        return self.store.get("piece", self.key(digest)) is not None

    def load(self, digest: str) -> Callable[..., Sequence[Any]] | None:
        """A stored piece, ready to run; None when there is none that can be loaded."""
        payload = self.store.get("piece", self.key(digest))
        if payload is None:
            return None
        try:
            return self.compiler.load(pickle.loads(payload)[0])
        except OSError as exc:  # such as a full disk, where kernels are unpacked: no fault of the piece
            self.store.note(f"a stored piece can't be loaded: {exc.strerror or exc}; it is made anew")
            return None
        except Exception as exc:  # whatever a stored piece raises, it is compiled anew
            self.store.drop("piece", self.key(digest), f"it can't be loaded: {type(exc).__name__}: {exc}"[:200])
            return None

    def load_graph(self, digest: str) -> Callable[..., Sequence[Any]] | None:
        """The uncompiled form of a stored piece, to compare with."""
        payload = self.store.get("piece", self.key(digest))
        try:
            return graph_from_bytes(pickle.loads(payload)[1]) if payload is not None else None
        except Exception:
            return None

    def keep(self, digest: str, artifact: bytes, piece: fx.GraphModule) -> None:
        """Store a compiled piece."""
        payload = pickle.dumps((artifact, _pickled(piece)))
        self.store.put("piece", self.key(digest), payload, about=f"{len(piece.graph.nodes)} nodes, {digest[:12]}")

    def lock(self, digest: str, timeout_s: float) -> AbstractContextManager[bool]:
        """Hold the lock of a piece."""
        return self.store.lock("piece", self.key(digest), timeout_s)


def _pickled(piece: fx.GraphModule) -> bytes:
    """A piece's graph; empty when it can't be stored."""
    with contextlib.suppress(Exception):
        return graph_to_bytes(piece)
    return b""


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
    lock: Any = field(default_factory=threading.RLock)

    def poll(self, report: Report, deadline: float | None = None) -> None:
        """Swap in what was compiled beside serving; wait for it until `deadline` (`time.monotonic()`), if given."""
        with self.lock:
            for ends in self.ends:
                ends.poll(self.compiled.__setitem__, deadline)
                report.compiled_pieces += ends.compiled
                ends.compiled = 0
            self.ends = [ends for ends in self.ends if ends.pending]
            report.pending_pieces = sum(len(ends.runners) for ends in self.ends)


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
    deferred = {found: jobs.pop(found) for found in later}
    local = _compile_new(jobs, compiler, cache, captured)
    ends = None
    # Asked last: a fork takes with it what compiling the others has loaded.
    if deferred and isinstance(compiler, StoringCompiler) and compiler.forks([j.inputs for j in deferred.values()]):
        ends = Ends(compiler, deferred, lambda: len(_guards(captured)), cache.store.load if cache.store else None)
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
    return Job(piece.gm, inputs, lock, keep, stored)


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
            what = f"{compiler.name} can't compile piece {found.digest[:12]}: {_brief(result.error)}"
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


def _brief(exc: Exception) -> str:
    lines = str(exc).strip().splitlines()
    return f"{type(exc).__name__}: {lines[0][:300]}" if lines else type(exc).__name__
