"""The store that a model uses: a local one, optionally backed by a remote one."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from glowplug.store.envelope import SigningKey, pack, plain, read_header
from glowplug.store.local import LocalStore, unlink
from glowplug.store.remote import RemoteStore

logger = logging.getLogger("glowplug")

LOCK_TIMEOUT_S = 600.0
"""How long to wait for another process that builds the same artifact before building it here too."""


class ArtifactStore:
    """Artifacts by content: a key covers everything that the content depends on, so equal keys mean equal content.

    A failure never stops a start: it is recorded, logged once, and the artifact is built again.

    Args:
        root: folder of the local store.
        url: a remote store, see `RemoteStore`; the local store is then its cache.
        signing_key: required with `url`. Without a key, artifacts are written unsigned.

    Attributes:
        problems: what went wrong, in words.
        counts: `"piece hits"`, `"piece misses"`, `"piece stored"`, and so on for each artifact kind.

    Raises:
        StoreError: others can write to the folder, or the URL can't be used.
    """

    def __init__(self, root: Path, url: str | None = None, signing_key: SigningKey | None = None) -> None:
        self.problems: list[str] = []
        self.counts: Counter[str] = Counter()
        self.signing_key = signing_key
        self.local = LocalStore(root, self.note, signing_key if url is not None else None)
        self.remote = RemoteStore(url, signing_key, self.note) if url is not None and signing_key is not None else None

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process: a store at the same places."""
        url = self.remote.url if self.remote is not None else None
        return ArtifactStore, (self.local.root, url, self.signing_key)

    @property
    def place(self) -> str:
        """The location, for people."""
        return self.remote.shown if self.remote is not None else str(self.local.root)

    def note(self, problem: str) -> None:
        """Record a problem, and log it once."""
        problem = plain(problem)
        if problem not in self.problems:
            self.problems.append(problem)
            logger.warning("glowplug: %s", problem)

    def get(self, kind: str, key: str) -> bytes | None:
        """The verified payload of an artifact; None if there is none."""
        payload = self.local.read(kind, key)
        if payload is None and self.remote is not None:
            content = self.remote.read(kind, key)
            if content is not None:
                self.local.write(kind, key, content)
                payload = content[read_header(content)[1] :]
        self.counts[f"{kind} {'hits' if payload is not None else 'misses'}"] += 1
        return payload

    def put(self, kind: str, key: str, payload: bytes, about: str = "") -> None:
        """Store an artifact."""
        content = pack(kind, key, payload, self.signing_key, about)
        stored = self.local.write(kind, key, content)
        if self.remote is not None:
            stored = self.remote.write(kind, key, content) or stored
        self.counts[f"{kind} stored"] += stored

    def drop(self, kind: str, key: str, why: str) -> None:
        """Delete an artifact that can't be used from the local store."""
        self.note(f"the stored {kind} {key[:12]} is not used: {why}; it is built again")
        unlink(self.local.path(kind, key))

    def lock(self, kind: str, key: str, timeout_s: float = LOCK_TIMEOUT_S) -> AbstractContextManager[bool]:
        """Hold the lock of an artifact on this machine, see `LocalStore.lock`."""
        return self.local.lock(kind, key, timeout_s)
