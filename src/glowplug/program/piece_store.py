"""Compiled pieces in a store, and the graphs of pieces that are still being compiled."""

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
        compiler: compiles and loads the pieces.
        environment: everything besides a piece that its compilation depends on.
        scratch: the temporary folder of a store that belongs to this process alone, else None.
    """

    store: ArtifactStore
    compiler: StoringCompiler
    environment: str
    scratch: Scratch | None = None

    @classmethod
    def temporary(cls, compiler: StoringCompiler) -> PieceStore | None:
        """A store through which this process's jobs hand over pieces; None if its folder can't be created."""
        try:
            scratch = Scratch("store")
            return cls(ArtifactStore(scratch.path), compiler, "", scratch)
        except (OSError, StoreError):
            return None

    @property
    def lost(self) -> bool:
        """Whether this is a temporary store of the parent process, which this fork can't rely on."""
        return self.scratch is not None and not self.scratch.ours

    @property
    def writable(self) -> bool:
        """Whether jobs can write to the store."""
        return os.access(self.store.local.root, os.W_OK)

    def takes(self, fingerprint: Fingerprint) -> bool:
        """Whether every process that uses the store computes the same digest for a piece."""
        return fingerprint.stable or self.scratch is not None

    def key(self, digest: str) -> str:
        """The key of a piece in the store, from its digest."""
        return hashlib.sha256(f"{self.environment}\n{digest}".encode()).hexdigest()

    def has(self, digest: str) -> bool:
        """Whether a piece is stored."""
        return self.store.get("piece", self.key(digest)) is not None

    def arrived(self, digest: str) -> bool:
        """Whether a piece that another process of this machine makes is stored."""
        return self.store.local.path("piece", self.key(digest)).exists()

    def load(self, digest: str) -> Run | None:
        """A stored piece, ready to run; None if there is none or it can't be loaded."""
        loaded = self.load_with_graph(digest)
        return loaded[0] if loaded is not None else None

    def load_with_graph(self, digest: str) -> tuple[Run, bytes] | None:
        """See `load`; with the piece's graph, for `unpickled`."""
        payload = self.store.get("piece", self.key(digest))
        if payload is None:
            return None
        try:
            artifact, graph = pickle.loads(payload)
            return self.compiler.load(artifact), graph
        except OSError as exc:  # such as a full disk when kernels are unpacked: not the piece's fault
            self.store.note(f"a stored piece can't be loaded: {exc.strerror or exc}; it is built again")
            return None
        except Exception as exc:  # whatever a stored piece raises, recompile it
            self.store.drop("piece", self.key(digest), f"it can't be loaded: {said(exc)}")
            return None

    def load_graph(self, digest: str) -> Run | None:
        """The uncompiled form of a piece, to compare with, or to run until the piece is compiled."""
        payload = self.store.get("piece", self.key(digest))
        try:
            graph = pickle.loads(payload)[1] if payload is not None else self.store.get("graph", self.key(digest))
        except Exception:
            return None
        return unpickled(graph)

    def keep(self, digest: str, artifact: bytes, piece: fx.GraphModule) -> None:
        """Store a compiled piece."""
        self._put("piece", digest, pickle.dumps((artifact, _pickled(piece))), piece)

    def keep_graph(self, digest: str, piece: fx.GraphModule) -> None:
        """Store the uncompiled form of a piece while the holder of its lock compiles it."""
        self._put("graph", digest, _pickled(piece), piece)

    def abandoned(self, digest: str) -> bool:
        """Whether a process started to compile this deferred piece, and no process is compiling it any more."""
        return self.store.get("graph", self.key(digest)) is not None and not self.busy(digest)

    def busy(self, digest: str, deadline: float | None = None) -> bool:
        """Whether another process is compiling a piece. Waits for it until `deadline` (`time.monotonic()`)."""
        with self.lock(digest, max(deadline - time.monotonic(), 0) if deadline is not None else 0) as locked:
            return not locked

    def lock(self, digest: str, timeout_s: float) -> AbstractContextManager[bool]:
        """Hold the lock of a piece, see `ArtifactStore.lock`."""
        return self.store.lock("piece", self.key(digest), timeout_s)

    def _put(self, form: str, digest: str, payload: bytes, piece: fx.GraphModule) -> None:
        self.store.put(form, self.key(digest), payload, about=f"{len(piece.graph.nodes)} nodes, {digest[:12]}")


def unpickled(graph: bytes | None) -> Run | None:
    """The uncompiled form of a piece; None if nothing was stored, or it can't be read."""
    with contextlib.suppress(Exception):
        return graph_from_bytes(graph) if graph else None
    return None


def _pickled(piece: fx.GraphModule) -> bytes:
    """A piece's graph as bytes; empty if it can't be pickled."""
    with contextlib.suppress(Exception):
        return graph_to_bytes(piece)
    return b""
