"""Whose hands can reach a folder or a file: a stored artifact is code that this process runs."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from glowplug.errors import ArtifactError, StoreError


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for this user alone, whatever the umask."""
    missing, asked = [], folder
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    for place in reversed(missing):
        place.mkdir(mode=0o700, exist_ok=True)
    if not asked.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(asked))


def check_private(root: Path) -> Path:
    """A folder without symbolic links, which might be changed later; StoreError where others can write to it, itself or
    through a folder that it lies in."""
    place = root.resolve()
    if os.name != "posix":
        return place
    for folder in (place, *place.parents):
        status = folder.stat()
        how = remedy = ""
        if not _mine(status):
            how = "belongs to another user"
        # In a folder like /tmp, nobody can rename what is ours.
        elif _shared(status) and (folder == place or not status.st_mode & stat.S_ISVTX):
            how, remedy = "can be written to by others", f"chmod go-w {folder}, or "
        if how:
            raise StoreError(
                f"the artifact store {root} is refused: {folder} {how}, and a stored artifact is code that this "
                f"process runs. To go on: {remedy}give another cache_dir"
            )
    return place


def read_private(path: Path) -> bytes:
    """The content of a file; ArtifactError where others can have written it, or it is no file."""
    # Not blocking: where somebody has put a pipe, opening it would wait for ever.
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(number, "rb") as file:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError("it is no file")
        if os.name == "posix":
            for held in (status, path.parent.stat(), path.parent.parent.stat()):
                if _shared(held) or not _mine(held):
                    raise ArtifactError("others can write to it, or to the folder that it is in")
        return file.read()


def _mine(status: os.stat_result) -> bool:
    return status.st_uid in (os.geteuid(), 0)


def _shared(status: os.stat_result) -> bool:
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
