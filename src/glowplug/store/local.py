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
"""How old a half-written file or a lock is when whoever made it must have finished, or be dead."""
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
    """Artifacts in a folder. Nothing that goes wrong here stops a start: it is noted.

    Args:
        root: the folder; made, for this user alone, where it is missing. StoreError where others can write to it.
        note: is told what goes wrong.
        signing_key: what is read must be signed by it: what lies here came from a place that others can write to.
            None: signatures are not looked at.
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
        """An artifact's payload; None when there is none that is whole. A damaged one is removed."""
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
            self.note(f"the stored {kind} {key[:12]} is not used: {exc}; it is made anew")
            unlink(path)
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
            self.note(f"a {kind} could not be stored in {self.root}: {_words(exc)}")
            if part is not None:
                unlink(Path(part))
            return False
        return True

    @contextlib.contextmanager
    def lock(self, kind: str, key: str, timeout_s: float) -> Iterator[bool]:
        """Hold the lock of an artifact, which its maker holds; yields False when another process holds it still.

        It is the operating system's: it ends with the process that holds it. Where no lock can be had, as the folder
        can't be written to, nobody else has one either, and it yields True.

        Args:
            kind, key: the artifact.
            timeout_s: seconds to wait for it; 0: don't.
        """
        folder = self.root / "locks"
        with contextlib.ExitStack() as stack:
            held = True
            try:
                if self.usable:
                    make_folder(folder)
                    lock = FileLock(folder / f"{kind}-{key}.lock", mode=0o600)
                    stack.enter_context(lock.acquire(timeout=timeout_s))
            except Timeout:
                held = False
            except (OSError, NotImplementedError) as exc:
                self.note(f"no lock can be had in {self.root}: {_words(exc)}")
            yield held

    # -- for people ------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """Every artifact, the last used first."""
        found = []
        for path in (path for kind in KINDS for path in sorted(self.root.glob(f"{kind}s/*/*{_SUFFIX}"))):
            with contextlib.suppress(OSError):
                status = path.stat()
                header = _header(path) if stat.S_ISREG(status.st_mode) else None
                found.append(Entry(path, status.st_size, status.st_mtime, header))
        return sorted(found, key=lambda entry: -entry.used)

    def check(self, signing_key: SigningKey | None = None) -> list[tuple[Entry, str]]:
        """Every artifact that is damaged, in a wrong place, or not signed by a key, with what is wrong."""
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


def _words(exc: Exception) -> str:
    return getattr(exc, "strerror", None) or str(exc)


def _header(path: Path) -> Header | None:
    try:
        with path.open("rb") as file:
            return read_header(file.read(_HEADER_BYTES))[0]
    except (OSError, ArtifactError):
        return None
