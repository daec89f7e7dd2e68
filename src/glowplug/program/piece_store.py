"""Compiled pieces in a store, and the graphs of those that are still being compiled."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import fx

from glowplug.compilers.base import StoringCompiler
from glowplug.errors import StoreError
from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.pickled import graph_from_bytes, graph_to_bytes
from glowplug.reasons import said
from glowplug.runtime.forks import Scratch
from glowplug.store.store import ArtifactStore

Run = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class PieceStore:
    """The pieces of a store that this process can use.

    Attributes:
        store: the store.
        compiler: makes and loads them.
        environment: everything besides a piece that its compilation depends on.
        scratch: the folder that the store lies in and goes with, if it is one of this process alone.
    """

    store: ArtifactStore
    compiler: StoringCompiler
    environment: str
    scratch: Scratch | None = None

    @classmethod
    def temporary(cls, compiler: StoringCompiler) -> PieceStore | None:
        """A store of this process, for what its jobs hand over; None where no folder can be made for it."""
        try:
            scratch = Scratch("store")
            return cls(ArtifactStore(scratch.path), compiler, "", scratch)
        except (OSError, StoreError):
            return None

    @property
    def lost(self) -> bool:
        """Whether it is a temporary one of the process that this one is a fork of, and goes with that."""
        return self.scratch is not None and not self.scratch.ours

    @property
    def writable(self) -> bool:
        """Whether jobs can leave pieces there."""
        return os.access(self.store.local.root, os.W_OK)

    def takes(self, found: Fingerprint) -> bool:
        """Whether all that use the store know a piece by its digest."""
        return found.stable or self.scratch is not None

    def key(self, digest: str) -> str:
        """The address of a piece, given its fingerprint's digest."""
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
        try:
            graph = pickle.loads(payload)[1] if payload is not None else self.store.get("graph", self.key(digest))
            return graph_from_bytes(graph) if graph else None
        except Exception:
            return None

    def keep(self, digest: str, artifact: bytes, piece: fx.GraphModule) -> None:
        """Store a compiled piece."""
        self._put("piece", digest, pickle.dumps((artifact, _pickled(piece))), piece)

    def keep_graph(self, digest: str, piece: fx.GraphModule) -> None:
        """Store the uncompiled form of a piece that is being compiled by whoever holds its lock."""
        self._put("graph", digest, _pickled(piece), piece)

    def abandoned(self, digest: str) -> bool:
        """Whether somebody began to compile a piece beside serving, and nobody is at it any more."""
        return self.store.get("graph", self.key(digest)) is not None and not self.busy(digest)

    def busy(self, digest: str, deadline: float | None = None) -> bool:
        """Whether another process is compiling a piece. Waits for it until `deadline` (`time.monotonic()`)."""
        with self.lock(digest, max(deadline - time.monotonic(), 0) if deadline is not None else 0) as held:
            return not held

    def lock(self, digest: str, timeout_s: float) -> AbstractContextManager[bool]:
        """Hold the lock of a piece, see `ArtifactStore.lock`."""
        return self.store.lock("piece", self.key(digest), timeout_s)

    def _put(self, kind: str, digest: str, payload: bytes, piece: fx.GraphModule) -> None:
        self.store.put(kind, self.key(digest), payload, about=f"{len(piece.graph.nodes)} nodes, {digest[:12]}")


def _pickled(piece: fx.GraphModule) -> bytes:
    """A piece's graph; empty when it can't be stored."""
    with contextlib.suppress(Exception):
        return graph_to_bytes(piece)
    return b""
