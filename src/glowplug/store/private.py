"""Checks that only this user can write to a folder or file: a stored artifact is code that this process runs."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from glowplug.errors import ArtifactError, StoreError


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents for this user alone, whatever the umask."""
    missing, existing = [], folder
    while not os.path.lexists(existing):
        missing.append(existing)
        existing = existing.parent
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def check_private(root: Path) -> Path:
    """The resolved path of a folder, as a symbolic link might be changed later. StoreError if others can write to the
    folder or to one of its parents."""
    place = root.resolve()
    if os.name != "posix":
        return place
    for folder in (place, *place.parents):
        status = folder.stat()
        how = remedy = ""
        if not _mine(status):
            how = "belongs to another user"
        # The sticky bit of a parent like /tmp keeps others from renaming our folder.
        elif _shared(status) and (folder == place or not status.st_mode & stat.S_ISVTX):
            how, remedy = "can be written to by others", f"chmod go-w {folder}, or "
        if how:
            raise StoreError(
                f"the artifact store {root} is refused: {folder} {how}, and a stored artifact is code that this "
                f"process runs. To go on: {remedy}give another cache_dir"
            )
    return place


def read_private(path: Path) -> bytes:
    """The content of a regular file; ArtifactError if it is none, or others can write to it."""
    # Non-blocking, because opening a planted pipe would hang.
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(number, "rb") as file:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError("it is no file")
        if os.name == "posix":
            for checked in (status, path.parent.stat(), path.parent.parent.stat()):
                if _shared(checked) or not _mine(checked):
                    raise ArtifactError("others can write to it, or to the folder that it is in")
        return file.read()


def _mine(status: os.stat_result) -> bool:
    return status.st_uid in (os.geteuid(), 0)


def _shared(status: os.stat_result) -> bool:
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
