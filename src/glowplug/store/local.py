"""The store on this machine's disk: whole files or none, one writer at a time, nobody else's hands on it."""

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
from glowplug.store.envelope import Header, read_header, unpack

KINDS = ("manifest", "piece", "inside")
_SUFFIX = ".glow"
_STALE_PART_S = 3600.0
"""How old a half-written file is when its writer must be dead."""
_HEADER_BYTES = 8192


@dataclass(frozen=True)
class Entry:
    """One artifact on disk.

    Attributes:
        path: its file.
        size: of the file, in bytes.
        used: when it was last read or written, in seconds since 1970.
        header: what its envelope says; None when that can't be read.
    """

    path: Path
    size: int
    used: float
    header: Header | None

    @property
    def kind(self) -> str:
        """What lies in its place: `"piece"`, `"inside"` or `"manifest"`."""
        return self.path.parent.parent.name.removesuffix("s")

    @property
    def key(self) -> str:
        """Its address."""
        return self.path.name.removesuffix(_SUFFIX)


class LocalStore:
    """Artifacts in a folder.

    Args:
        root: the folder; made, for this user alone, where it is missing.
        note: is told what goes wrong: nothing that goes wrong here stops a start.

    Raises:
        StoreError: others can write to the folder, or it is no folder.
    """

    def __init__(self, root: Path, note: Callable[[str], None]) -> None:
        self.root = root
        self.note = note
        self.usable = self._make()
        if self.usable:
            check_private(root)

    def _make(self) -> bool:
        if self.root.exists() and not self.root.is_dir():
            raise StoreError(f"the artifact store {self.root} is not a folder; give another cache_dir")
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            self.note(f"the artifact store {self.root} can't be made: {exc.strerror or exc}")
            return False
        return True

    def path(self, kind: str, key: str) -> Path:
        """The file of an artifact."""
        return self.root / f"{kind}s" / key[:2] / f"{key}{_SUFFIX}"

    def read(self, kind: str, key: str) -> bytes | None:
        """An artifact's payload; None when there is none that is whole. A damaged one is removed."""
        if not self.usable:
            return None
        path = self.path(kind, key)
        try:
            content = path.read_bytes()
            payload = unpack(content, kind, key, None)
        except FileNotFoundError:
            return None
        except OSError as exc:
            self.note(f"the stored {kind} {key[:12]} can't be read: {exc.strerror or exc}")
            return None
        except ArtifactError as exc:
            self.note(f"the stored {kind} {key[:12]} is not used: {exc}; it is made anew")
            self.remove(kind, key)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return payload

    def write(self, kind: str, key: str, content: bytes) -> bool:
        """Keep an envelope, whole or not at all; returns whether it was kept."""
        if not self.usable:
            return False
        path = self.path(kind, key)
        part: str | None = None
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            number, part = tempfile.mkstemp(prefix=".part-", dir=path.parent)
            with os.fdopen(number, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError as exc:
            self.note(f"a {kind} could not be stored in {self.root}: {exc.strerror or exc}")
            if part is not None:
                with contextlib.suppress(OSError):
                    os.unlink(part)
            return False
        return True

    def remove(self, kind: str, key: str) -> None:
        """Forget an artifact."""
        with contextlib.suppress(OSError):
            self.path(kind, key).unlink()

    @contextlib.contextmanager
    def lock(self, kind: str, key: str, timeout_s: float) -> Iterator[bool]:
        """Hold the lock of an artifact, which its maker holds; yields whether it is held.

        It is the operating system's: it ends with the process that holds it.

        Args:
            kind, key: the artifact.
            timeout_s: seconds to wait for it; 0: don't.
        """
        if not self.usable:
            yield False
            return
        folder = self.root / "locks"
        lock = FileLock(folder / f"{kind}-{key}.lock")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock.acquire(timeout=timeout_s)
        except Timeout:
            yield False
            return
        except (OSError, NotImplementedError) as exc:
            self.note(f"no lock can be had in {self.root}: {exc}")
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    # -- for people ------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """Every artifact, the last used first."""
        found = []
        for kind in KINDS:
            for path in sorted(self.root.glob(f"{kind}s/*/*{_SUFFIX}")):
                with contextlib.suppress(OSError):
                    status = path.stat()
                    found.append(Entry(path, status.st_size, status.st_mtime, _header(path)))
        return sorted(found, key=lambda entry: -entry.used)

    def check(self) -> list[tuple[Entry, str]]:
        """Every artifact that is damaged or in a wrong place, with what is wrong."""
        bad = []
        for entry in self.entries():
            try:
                unpack(entry.path.read_bytes(), entry.kind, entry.key, None)
            except (ArtifactError, OSError) as exc:
                bad.append((entry, str(exc)))
        return bad

    def prune(self, max_size: int) -> list[Entry]:
        """Remove what was used longest ago, until all is no larger than `max_size` bytes; returns what was removed."""
        removed = []
        kept = 0
        for entry in self.entries():
            if kept + entry.size <= max_size:
                kept += entry.size
                continue
            with contextlib.suppress(OSError):
                entry.path.unlink()
                removed.append(entry)
        for part in self.root.glob("*/*/.part-*"):
            with contextlib.suppress(OSError):
                if time.time() - part.stat().st_mtime > _STALE_PART_S:
                    part.unlink()
        return removed


def _header(path: Path) -> Header | None:
    try:
        with path.open("rb") as file:
            return read_header(file.read(_HEADER_BYTES))[0]
    except (OSError, ArtifactError):
        return None


def check_private(root: Path) -> None:
    """Refuse a folder that others can write to, itself or through a folder that it lies in: whoever writes there has
    this process run their code.

    Raises:
        StoreError: they can.
    """
    if os.name != "posix":
        return
    me = (os.geteuid(), 0)
    place = root.resolve()
    for folder in (place, *place.parents):
        status = folder.stat()
        shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if folder != place and status.st_mode & stat.S_ISVTX:  # in a folder like /tmp, nobody can rename what is ours
            continue
        if shared or status.st_uid not in me:
            how = "can be written to by others" if shared else "belongs to another user"
            raise StoreError(
                f"the artifact store {root} is refused: {folder} {how}, and a stored artifact is code that this "
                f"process runs. chmod go-w {folder}, or give another cache_dir"
            )
