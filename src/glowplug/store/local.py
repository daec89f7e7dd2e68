"""The local store: atomic writes, a lock per artifact, and no access for other users."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from glowplug.errors import ArtifactError, StoreError
from glowplug.store.envelope import Header, SigningKey, read_header, unpack
from glowplug.store.private import check_private, make_folder, read_private

KINDS = ("manifest", "piece", "graph", "inside")
_SUFFIX = ".glow"
_STALE_S = 3600.0
"""Age at which a partial file or a lock must be a leftover of a process that has ended."""
_HEADER_BYTES = 8192


@dataclass(frozen=True)
class Entry:
    """One artifact on disk.

    Attributes:
        path: its file.
        size: size of the file in bytes.
        used: time of the last read or write, in seconds since 1970.
        header: the envelope's header; None if it can't be read.
    """

    path: Path
    size: int
    used: float
    header: Header | None

    @property
    def kind(self) -> str:
        """The kind that its folder stands for: one of `KINDS`."""
        return self.path.parent.parent.name.removesuffix("s")

    @property
    def key(self) -> str:
        """Its address."""
        return self.path.name.removesuffix(_SUFFIX)


class LocalStore:
    """Artifacts in a folder. A failure never stops a start: it is passed to `note`.

    Args:
        root: the folder. If missing, it is created for this user alone.
        note: receives each problem, in words.
        signing_key: the key that must have signed each artifact, for a cache of a place that others can write to.
            With None, signatures are ignored.

    Raises:
        StoreError: others can write to the folder, or it is not a folder.
    """

    def __init__(self, root: Path, note: Callable[[str], None], signing_key: SigningKey | None = None) -> None:
        self.root = root
        self.note = note
        self.signing_key = signing_key
        self.usable = False
        try:
            if os.path.lexists(root) and not root.is_dir():
                raise StoreError(f"the artifact store {root} is not a folder; give another cache_dir")
            make_folder(root)
            self.root = check_private(root)
            self.usable = True
        except StoreError:
            raise
        except (OSError, RuntimeError, ValueError) as exc:
            note(f"the artifact store {root} can't be made: {_words(exc)}")

    def path(self, kind: str, key: str) -> Path:
        """The file of an artifact."""
        return self.root / f"{kind}s" / key[:2] / f"{key}{_SUFFIX}"

    def read(self, kind: str, key: str) -> bytes | None:
        """The verified payload of an artifact; None if it is missing or damaged. A damaged file is deleted."""
        if not self.usable:
            return None
        path = self.path(kind, key)
        try:
            payload = unpack(read_private(path), kind, key, self.signing_key)
        except FileNotFoundError:
            return None
        except OSError as exc:
            self.note(f"the stored {kind} {key[:12]} can't be read: {_words(exc)}")
            return None
        except ArtifactError as exc:
            self.note(f"the stored {kind} {key[:12]} is not used: {exc}; it is built again")
            unlink(path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return payload

    def write(self, kind: str, key: str, content: bytes) -> bool:
        """Store an envelope atomically; returns whether that worked."""
        if not self.usable:
            return False
        path = self.path(kind, key)
        part: str | None = None
        try:
            make_folder(path.parent)
            number, part = tempfile.mkstemp(prefix=".part-", dir=path.parent)
            with os.fdopen(number, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError as exc:
            self.note(f"a {kind} could not be stored in {self.root}: {_words(exc)}")
            if part is not None:
                unlink(Path(part))
            return False
        return True

    @contextlib.contextmanager
    def lock(self, kind: str, key: str, timeout_s: float) -> Iterator[bool]:
        """Hold the lock of an artifact while building it; yields False if another process still holds it.

        The operating system releases the lock when its process ends. In a folder that can't be written to nobody can
        take a lock, so it yields True. A timeout of 0 means no wait.
        """
        folder = self.root / "locks"
        with contextlib.ExitStack() as stack:
            acquired = True
            try:
                if self.usable:
                    make_folder(folder)
                    lock = FileLock(folder / f"{kind}-{key}.lock", mode=0o600)
                    stack.enter_context(lock.acquire(timeout=timeout_s))
            except Timeout:
                acquired = False
            except (OSError, NotImplementedError) as exc:
                self.note(f"no lock can be had in {self.root}: {_words(exc)}")
            yield acquired

    # -- for people ------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """Every artifact, most recently used first."""
        entries = []
        for path in (path for kind in KINDS for path in sorted(self.root.glob(f"{kind}s/*/*{_SUFFIX}"))):
            with contextlib.suppress(OSError):
                status = path.stat()
                header = _header(path) if stat.S_ISREG(status.st_mode) else None
                entries.append(Entry(path, status.st_size, status.st_mtime, header))
        return sorted(entries, key=lambda entry: -entry.used)

    def check(self, signing_key: SigningKey | None = None) -> list[tuple[Entry, str]]:
        """Every artifact that is damaged, misplaced or not signed by the key, with the reason."""
        bad = []
        for entry in self.entries():
            try:
                unpack(read_private(entry.path), entry.kind, entry.key, signing_key or self.signing_key)
                if entry.path != self.path(entry.kind, entry.key):
                    raise ArtifactError(f"it lies in {entry.path.parent.name}/, where nobody looks for it")
            except FileNotFoundError:  # pruned in the meantime
                continue
            except (ArtifactError, OSError) as exc:
                bad.append((entry, str(exc)))
        return bad

    def prune(self, max_size: int) -> list[Entry]:
        """Delete the least recently used artifacts until at most `max_size` bytes remain; returns the deleted ones.

        Also deletes stale partial files of killed processes and locks of missing artifacts. This does not disturb
        processes that loaded an artifact, as they have it in memory.
        """
        entries = self.entries()
        size = sum(entry.size for entry in entries)
        removed = []
        while entries and size > max_size:
            entry = entries.pop()
            size -= entry.size
            if unlink(entry.path):
                removed.append(entry)
        names = {f"{entry.kind}-{entry.key}" for entry in entries}
        locks = [path for path in self.root.glob("locks/*.lock") if path.stem not in names]
        for path in [*self.root.glob("*/*/.part-*"), *locks]:
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_S:
                    path.unlink()
        return removed


def unlink(path: Path) -> bool:
    """Delete a file; returns whether that worked."""
    try:
        path.unlink()
    except OSError:
        return False
    return True


def _words(exc: Exception) -> str:
    return getattr(exc, "strerror", None) or str(exc)


def _header(path: Path) -> Header | None:
    try:
        with path.open("rb") as file:
            return read_header(file.read(_HEADER_BYTES))[0]
    except (OSError, ArtifactError):
        return None
