"""Compiled pieces in a store, and the graphs of those that are still being compiled."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx

from glowplug.compilers.base import StoringCompiler
from glowplug.errors import StoreError
from glowplug.forks import Scratch
from glowplug.graph.pickled import graph_from_bytes, graph_to_bytes
from glowplug.reasons import said

Run = Callable[..., Sequence[Any]]


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
    scratch: Scratch | None = None

    @classmethod
    def temporary(cls, compiler: StoringCompiler) -> PieceStore | None:
        """A store of this process, for what its jobs hand over; None where no folder can be made for it."""
        from glowplug.store.store import ArtifactStore

        try:
            scratch = Scratch("store")
            return cls(ArtifactStore(scratch.path), compiler, "", scratch)
        except (OSError, StoreError):
            return None

    def key(self, digest: str) -> str:
        """The address of a piece with a fingerprint."""
        return hashlib.sha256(f"{self.environment}\n{digest}".encode()).hexdigest()

    def has(self, digest: str) -> bool:
        """Whether a piece is stored."""
        return self.store.get("piece", self.key(digest)) is not None

    def load(self, digest: str) -> Run | None:
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
            self.store.drop("piece", self.key(digest), f"it can't be loaded: {said(exc)}")
            return None

    def load_graph(self, digest: str) -> Run | None:
        """The uncompiled form of a piece, to compare with, or to run until it is compiled."""
        payload = self.store.get("piece", self.key(digest))
        graph = self.store.get("graph", self.key(digest)) if payload is None else None
        try:
            if payload is not None:
                graph = pickle.loads(payload)[1]
            return graph_from_bytes(graph) if graph else None
        except Exception:
            return None

    def graph_of_pending(self, digest: str, *, unfinished: bool) -> Run | None:
        """The uncompiled form of a piece that another process is compiling now, or, with `unfinished`, was to compile;
        None when there is no such process, or no such form."""
        if self.store.get("graph", self.key(digest)) is None:
            return None
        if unfinished:
            return self.load_graph(digest)
        with self.lock(digest, 0) as held:
            return self.load_graph(digest) if not held else None

    def keep_graph(self, digest: str, piece: fx.GraphModule) -> None:
        """Store the uncompiled form of a piece whose lock is held by whoever compiles it."""
        graph = _pickled(piece)
        if graph:
            self.store.put("graph", self.key(digest), graph, about=f"{len(piece.graph.nodes)} nodes, {digest[:12]}")

    def refuse(self, digest: str) -> None:
        """Note that a piece is to be compiled before its program is stored: an empty graph says so."""
        self.store.put("graph", self.key(digest), b"", about=f"compiled with its program, {digest[:12]}")

    def refuses(self, digest: str) -> bool:
        """Whether that was noted."""
        return self.store.get("graph", self.key(digest)) == b""

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
