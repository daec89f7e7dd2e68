"""Who compiles ends: a fork of this process, or another process whose program was found in the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from glowplug.compilers.base import StoringCompiler
from glowplug.compilers.fork import Beside
from glowplug.compilers.parallel import LOCKED, Job, Shelf, compile_beside
from glowplug.graph.fingerprint import Fingerprint
from glowplug.program.ends import Delivered
from glowplug.program.piece_store import PieceStore

_LOCKS_S = 30.0
"""How long a fork may take to begin."""
_FINISH_S = 600.0
"""How long a fork may take to end."""


class ForkMaker:
    """A fork compiles them. Made inside the capture, once its program compiles.

    Args:
        compiler: compiles them.
        jobs: what is to be compiled.
        relations: as for `compile_jobs`.
        store: where another process may have stored them meanwhile.
    """

    def __init__(
        self,
        compiler: StoringCompiler,
        jobs: Mapping[Fingerprint, Job],
        relations: Callable[[], int],
        store: PieceStore | None = None,
    ) -> None:
        self.compiler = compiler
        self.store = store
        self.jobs = dict(jobs)
        self.beside: Beside = compile_beside(compiler, list(self.jobs.values()), relations)
        self._others: StoreMaker | None = None

    def collect(self, deadline: float | None) -> Mapping[Fingerprint, Delivered] | None:
        """See `Maker.collect`."""
        if self.beside.lost:
            return self._collect_stored(deadline)
        found: dict[Fingerprint, Delivered] = {}

        def take(folder: Path) -> None:
            shelf = Shelf(folder, list(self.jobs.values()))
            for index, piece in enumerate(self.jobs):
                done = shelf.collect(index, self.compiler)
                run = done.run if done is not None else self.store.load(piece.digest) if self.store else None
                if run is not None:
                    found[piece] = Delivered(run, ours=done is not None)

        self.beside.finish(take, deadline)
        if self.beside.pending:
            return None
        self.jobs.clear()
        return found

    def wait_until_locked(self) -> None:
        """Until the fork holds the locks of all pieces that it will store, by which other processes know of it."""
        self.beside.wait_for(LOCKED, time.monotonic() + _LOCKS_S)

    def finish(self) -> None:
        """Wait for the fork, and leave what it makes to others; a fork that does not end is given up."""
        self.beside.finish(lambda _: None, time.monotonic() + _FINISH_S)
        self.beside.give_up()

    def _collect_stored(self, deadline: float | None) -> Mapping[Fingerprint, Delivered] | None:
        """The same in a fork of the process that had them compiled: through the store, or not at all."""
        if self.store is None:
            return {}
        self._others = self._others or StoreMaker(self.store, {piece: piece.digest for piece in self.jobs})
        return self._others.collect(deadline)


class Build(Protocol):
    """A process that makes a program anew, and with it its pieces."""

    def outcome(self, deadline: float | None = None) -> Any:
        """What became of it; None while it is under way. Waits until `deadline` (`time.monotonic()`), if given."""
        ...


class StoreMaker:
    """Another process compiles them, and stores them: it holds their locks until it has.

    Args:
        store: the store.
        addresses: what the store knows each piece by.
        rebuild: begins to make them once more, where that process ended too early; None: can't be done here.
    """

    def __init__(
        self,
        store: PieceStore,
        addresses: Mapping[Fingerprint, str],
        rebuild: Callable[[], Build | None] | None = None,
    ) -> None:
        self.store = store
        self.rebuild = rebuild
        self._build: Build | None = None
        self._left = dict(addresses)
        self._found: dict[Fingerprint, Delivered] = {}

    def collect(self, deadline: float | None) -> Mapping[Fingerprint, Delivered] | None:
        """See `Maker.collect`."""
        if self._build is not None and self._build.outcome(deadline) is None:
            return None
        for piece, address in list(self._left.items()):
            with self.store.lock(address, max(deadline - time.monotonic(), 0) if deadline is not None else 0) as held:
                if not held:
                    return None
            run = self.store.load(address)
            if run is None and self.rebuild is not None:
                self._build, self.rebuild = self.rebuild(), None  # once: it may come to nothing again
                return self.collect(deadline)
            del self._left[piece]
            if run is not None:
                self._found[piece] = Delivered(run, ours=False)
        return self._found
