"""Compiles distinct pieces side by side, on Linux CPUs: the process forks once a core, each child takes pieces off a
common list and leaves artifacts in files, and this process, which takes pieces too, loads them.

A fork has the whole trace in memory at once; a new process would have to import torch and be sent graphs. It must not
touch a GPU, so pieces for one are compiled here, one after the other (Triton compiles their kernels side by side).
Whatever goes wrong in a child, its pieces are compiled here.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from glowplug.compilers.base import PieceCompiler, StoringCompiler
from glowplug.compilers.fork import Beside, fork, leave, orphaned, scratch

_PATIENCE_S = 60.0
"""How much longer than this process a child may take, before its pieces are compiled here."""
LOCKED = "locked"
"""The file by which a fork says that it holds its locks."""


@dataclass(frozen=True)
class Job:
    """One piece to compile.

    Attributes:
        piece: its graph.
        inputs: its inputs, as for `PieceCompiler.compile`.
        lock: `lock(timeout_s)` holds the piece's lock among all processes that may compile it.
        keep: stores its artifact; None when nothing is to be stored.
        stored: whether its artifact is in the store.
        refuse: notes in the store that compiling it writes down relations between sizes: it must be compiled before its
            program is stored, and not beside serving.
    """

    piece: fx.GraphModule
    inputs: Sequence[Any]
    lock: Callable[[float], AbstractContextManager[bool]] = lambda _: contextlib.nullcontext(True)
    keep: Callable[[bytes], None] | None = None
    stored: Callable[[], bool] = lambda: False
    refuse: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Done:
    """A compiled piece.

    Attributes:
        run: the callable; None when a child did not deliver.
        local: whether compiling it wrote down further relations between sizes, which hold in this capture alone.
        artifact: its form on disk, where that was asked for.
        error: what the compiler raised.
    """

    run: Callable[..., Any] | None = None
    local: bool = False
    artifact: bytes | None = None
    error: Exception | None = None


def compile_jobs(
    compiler: PieceCompiler, jobs: Sequence[Job], relations: Callable[[], int], advance: Callable[[], None]
) -> list[Done]:
    """Compile pieces, side by side where that is safe.

    Args:
        compiler: the compiler; one that can store what it compiles may be run in several processes.
        jobs: the pieces.
        relations: how many relations between sizes the capture has written down so far.
        advance: called once a piece.

    Returns:
        One result a job, in order. After an error the rest may be missing.
    """
    workers = _workers(len(jobs), _cores())
    if workers < 2 or not isinstance(compiler, StoringCompiler):
        return _compile_here(compiler, jobs, relations, advance, {})
    if not compiler.forks([job.inputs for job in jobs], several=True):
        return _compile_here(compiler, jobs, relations, advance, {})
    with scratch("pieces") as folder:
        shelf = Shelf(Path(folder), jobs)
        forked = [fork(lambda: _work(compiler, shelf, relations)) for _ in range(workers - 1)]
        children = [child for child in forked if child is not None]
        try:
            done: dict[int, Done] = {}
            start = time.monotonic()
            for index in shelf.claims():
                done[index] = _compile_one(compiler, jobs[index], relations)
                advance()
                if done[index].error is not None:
                    return [done.get(number, Done()) for number in range(len(jobs))]
            deadline = time.monotonic() + (time.monotonic() - start) + _PATIENCE_S
            for child in children:
                child.wait(deadline)
        finally:
            for child in children:
                child.stop()
        for index in range(len(jobs)):
            found = shelf.collect(index, compiler) if index not in done else None
            if found is not None:
                done[index] = found
                advance()
    return _compile_here(compiler, jobs, relations, advance, done)


def _compile_here(
    compiler: PieceCompiler,
    jobs: Sequence[Job],
    relations: Callable[[], int],
    advance: Callable[[], None],
    done: dict[int, Done],
) -> list[Done]:
    results = []
    for index, job in enumerate(jobs):
        result = done.get(index)
        if result is None:
            result = _compile_one(compiler, job, relations)
            advance()
        results.append(result)
        if result.error is not None:
            break
    return results


def _compile_one(compiler: PieceCompiler, job: Job, relations: Callable[[], int]) -> Done:
    before = relations()
    artifact = None
    try:
        if job.keep is not None and isinstance(compiler, StoringCompiler):
            run, artifact = compiler.compile_and_store(job.piece, job.inputs)
        else:
            run = compiler.compile(job.piece, job.inputs)
    except Exception as exc:
        return Done(error=exc)
    return Done(run, relations() > before, artifact)


class Shelf:
    """The folder where workers claim pieces and leave artifacts."""

    def __init__(self, folder: Path, jobs: Sequence[Job]) -> None:
        self.folder = folder
        self.jobs = jobs
        sizes = [len(job.piece.graph.nodes) for job in jobs]
        self.order = sorted(range(len(jobs)), key=lambda index: -sizes[index])

    def claims(self) -> Any:
        """Indices of pieces that no other worker has taken, the largest first."""
        for index in self.order:
            try:
                os.close(os.open(self.folder / f"{index}.claim", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            yield index

    def leave(self, index: int, local: bool, artifact: bytes) -> None:
        """Store an artifact, whole or not at all."""
        leave(self.folder / f"{index}.artifact", pickle.dumps((local, artifact)))

    def collect(self, index: int, compiler: StoringCompiler) -> Done | None:
        """What a child left for a piece; None if nothing that can be loaded, or if compiling it wrote down relations
        between sizes, which then are not known here."""
        try:
            local, artifact = pickle.loads((self.folder / f"{index}.artifact").read_bytes())
            return None if local else Done(compiler.load(artifact), artifact=artifact)
        except Exception:
            return None


def compile_beside(compiler: StoringCompiler, jobs: Sequence[Job], relations: Callable[[], int]) -> Beside:
    """Begin to compile pieces in a fork while this process serves. Inside the pieces' capture.

    Args:
        compiler: the compiler; it has said that it forks.
        jobs: the pieces.
        relations: as for `compile_jobs`.
    """
    return Beside(lambda folder: _work_alone(compiler, Shelf(folder, jobs), relations))


def _work(compiler: StoringCompiler, shelf: Shelf, relations: Callable[[], int]) -> None:
    """What a child does."""
    for index in shelf.claims():
        before = relations()
        artifact = compiler.compile_to_bytes(shelf.jobs[index].piece, shelf.jobs[index].inputs)
        shelf.leave(index, relations() > before, artifact)


def _work_alone(compiler: StoringCompiler, shelf: Shelf, relations: Callable[[], int]) -> None:
    """What a child does for which nobody waits: it stores what it makes by itself, and leaves alone what another
    process has stored in the meantime. It holds the lock of each piece from the beginning until it has stored it."""
    with contextlib.ExitStack() as all_locks:
        locks = [all_locks.enter_context(contextlib.ExitStack()) for _ in shelf.jobs]
        held = [lock.enter_context(job.lock(0)) for lock, job in zip(locks, shelf.jobs, strict=True)]
        leave(shelf.folder / LOCKED, b"")
        for index in sorted(shelf.claims(), key=lambda index: not held[index]):
            job = shelf.jobs[index]
            with locks[index]:
                if not held[index]:  # another process has it, and is done, or gone, before long
                    locks[index].enter_context(job.lock(_PATIENCE_S))
                if job.stored() or orphaned():
                    continue
                before = relations()
                artifact = compiler.compile_to_bytes(job.piece, job.inputs)
                local = relations() > before
                if local and not orphaned():
                    job.refuse()
                elif job.keep is not None and not orphaned():
                    job.keep(artifact)
            shelf.leave(index, local, artifact)


def _workers(jobs: int, cores: int) -> int:
    """How many processes to compile in.

    A piece alone already keeps two cores busy at times, as Inductor compiles its kernels side by side, and every
    process has its own first piece to get over. On 2 cores, 3 pieces took 4.8 s in one process and 5.1 s in two, 4
    pieces the same in both, 11 pieces 13 % less in two.
    """
    return 1 if cores <= 2 and jobs <= 4 else min(jobs, cores)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
