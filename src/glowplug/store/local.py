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
from glowplug.store.envelope import Header, SigningKey, read_header, unpack
from glowplug.store.private import check_private, make_folder, read_private

KINDS = ("manifest", "piece", "graph", "inside")
_SUFFIX = ".glow"
_STALE_S = 3600.0
"""How old a half-written file or a lock is when whoever made it must be done, or dead."""
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
        """What lies in its place: one of `KINDS`."""
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
        signing_key: what is read must be signed by it: what lies here came from a place that others can write to.
            None: signatures are not looked at.

    Raises:
        StoreError: others can write to the folder, or it is no folder.
    """

    def __init__(self, root: Path, note: Callable[[str], None], signing_key: SigningKey | None = None) -> None:
        self.root = root
        self.note = note
        self.signing_key = signing_key
        self.usable = self._make()

    def _make(self) -> bool:
        try:
            if os.path.lexists(self.root) and not self.root.is_dir():
                raise StoreError(f"the artifact store {self.root} is not a folder; give another cache_dir")
            make_folder(self.root)
            self.root = check_private(self.root)
        except (OSError, RuntimeError, ValueError) as exc:
            if isinstance(exc, StoreError):
                raise
            self.note(f"the artifact store {self.root} can't be made: {getattr(exc, 'strerror', None) or exc}")
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
            payload = unpack(read_private(path), kind, key, self.signing_key)
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
            make_folder(path.parent)
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
        unlink(self.path(kind, key))

    @contextlib.contextmanager
    def lock(self, kind: str, key: str, timeout_s: float) -> Iterator[bool]:
        """Hold the lock of an artifact, which its maker holds; yields False when another process holds it still.

        It is the operating system's: it ends with the process that holds it. Where no lock can be had, as the folder
        can't be written to, nobody else has one either, and it yields True.

        Args:
            kind, key: the artifact.
            timeout_s: seconds to wait for it; 0: don't.
        """
        if not self.usable:
            yield True
            return
        folder = self.root / "locks"
        lock = FileLock(folder / f"{kind}-{key}.lock", mode=0o600)
        try:
            make_folder(folder)
            lock.acquire(timeout=timeout_s)
        except Timeout:
            yield False
            return
        except (OSError, NotImplementedError) as exc:
            self.note(f"no lock can be had in {self.root}: {getattr(exc, 'strerror', None) or exc}")
            yield True
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
                    header = _header(path) if stat.S_ISREG(status.st_mode) else None
                    found.append(Entry(path, status.st_size, status.st_mtime, header))
        return sorted(found, key=lambda entry: -entry.used)

    def check(self, signing_key: SigningKey | None = None) -> list[tuple[Entry, str]]:
        """Every artifact that is damaged or in a wrong place, with what is wrong.

        Args:
            signing_key: by which each must be signed; None: as for reading.
        """
        bad = []
        for entry in self.entries():
            try:
                unpack(read_private(entry.path), entry.kind, entry.key, signing_key or self.signing_key)
                if entry.path != self.path(entry.kind, entry.key):
                    raise ArtifactError(f"it lies in {entry.path.parent.name}/, where nobody looks for it")
            except FileNotFoundError:  # somebody has pruned it meanwhile
                continue
            except (ArtifactError, OSError) as exc:
                bad.append((entry, str(exc)))
        return bad

    def prune(self, max_size: int) -> list[Entry]:
        """Remove what was used longest ago, until all is no larger than `max_size` bytes; returns what was removed.

        Also what nobody needs: half-written files of processes that were killed, and locks of what is not there. A
        process that is reading an artifact has it in memory, and goes on.
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
    """Delete a file; returns whether it was."""
    try:
        path.unlink()
    except OSError:
        return False
    return True


def _header(path: Path) -> Header | None:
    try:
        with path.open("rb") as file:
            return read_header(file.read(_HEADER_BYTES))[0]
    except (OSError, ArtifactError):
        return None
