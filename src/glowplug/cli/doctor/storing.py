"""The artifact store: where it is, whether it can be used, and how much is in it."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from glowplug.cli.doctor.finding import Finding
from glowplug.cli.sizes import show_size
from glowplug.errors import StoreError, UsageError
from glowplug.store import ArtifactStore, open_store
from glowplug.store.opening import CACHE_VARIABLE

_NOWHERE = "0" * 64
"""The address of an artifact that does not exist."""


def stores() -> Iterator[Finding]:
    """The store that `glowplug.compile` uses by default. Creates its folder, as `compile` does."""
    asked = bool(os.environ.get(CACHE_VARIABLE))
    try:
        store = open_store(strict=True)
    except (StoreError, UsageError) as exc:
        # Without a store of their own, models start cold; a store that was asked for must not be left out silently.
        state, what = ("problem", "") if asked or isinstance(exc, UsageError) else ("warning", "every start is cold: ")
        yield Finding("store", "place", f"{what}{exc}", state)  # type: ignore[arg-type]
        return
    if store is None:
        text = f"off ({CACHE_VARIABLE}): every start is cold"
        yield Finding("store", "place", text, "note", f"unset {CACHE_VARIABLE} to start warm")
        return
    yield Finding("store", "place", store.place)
    if store.remote is not None:
        yield _remote(store)
        yield Finding("store", "copy", str(store.local.root))
    yield _local(store.local.root, store.problems)
    if store.local.usable:
        entries = store.local.entries()
        size = sum(entry.size for entry in entries)
        free = shutil.disk_usage(store.local.root).free
        text = f"{len(entries)} artifacts, {show_size(size)}; {show_size(free)} free"
        yield Finding("store", "size", text)
    yield Finding("store", "signed", "artifacts are signed" if store.signing_key is not None else "no signing key")


def _remote(store: ArtifactStore) -> Finding:
    """Whether the remote store answers."""
    if not store.problems and store.remote is not None:
        store.remote.read("manifest", _NOWHERE)
    if store.problems:
        return Finding("store", "remote", store.problems[-1], "warning", "see that this machine can reach it")
    return Finding("store", "remote", "answers")


def _local(root: Path, problems: list[str]) -> Finding:
    """Whether artifacts can be written."""
    advice = f"make {root} a folder that you can write to, or name another one by {CACHE_VARIABLE}"
    if not root.is_dir():
        reason = problems[-1] if problems else "there is no such folder"
        return Finding("store", "writable", f"no, so every start is cold: {reason}", "warning", advice)
    mode = f"mode {stat.S_IMODE(root.stat().st_mode):03o}"
    try:
        with tempfile.TemporaryFile(dir=root) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as exc:
        text = f"no ({exc.strerror or exc}, {mode}): what is found is used, and nothing new is kept"
        return Finding("store", "writable", text, "warning", advice)
    return Finding("store", "writable", f"yes, by this user alone ({mode})")
