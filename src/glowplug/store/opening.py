"""Chooses the store of a model: an explicit location, the environment's, or this user's own."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import platformdirs

from glowplug.errors import StoreError, UsageError
from glowplug.store.envelope import KEY_FILE_VARIABLE, KEY_VARIABLE, SigningKey
from glowplug.store.remote import hide_password
from glowplug.store.store import ArtifactStore, logger

CACHE_VARIABLE = "GLOWPLUG_CACHE"
OFF = ("off", "0", "none")


def default_root() -> Path:
    """The platform's cache folder for this user's artifacts."""
    return platformdirs.user_cache_path("glowplug") / "artifacts"


def open_store(location: str | os.PathLike[str] | None = None, *, strict: bool = False) -> ArtifactStore | None:
    """The store at a location; None if the store is off.

    Args:
        location: a folder, an fsspec URL (`s3://bucket/folder`), or `"off"`. None stands for the environment variable
            `GLOWPLUG_CACHE` or, if that is unset, this user's own folder.
        strict: raise if this user's own folder is unsafe, too, which otherwise turns the store off with a warning.

    Raises:
        StoreError: others can write to the folder, or the URL has no signing key or an unknown protocol.
        UsageError: the location is empty, or the signing key can't be used.
    """
    if location is not None and not os.fspath(location):
        raise UsageError("the artifact store's place is empty; name a folder or a URL, or leave it out for your own")
    text = os.fspath(location) if location is not None else os.environ.get(CACHE_VARIABLE, "")
    if text.lower() in OFF:
        return None
    key = SigningKey.from_environment()
    root = default_root()
    if not text:
        return _own(root, key, strict)
    if "://" not in text:
        return ArtifactStore(Path(os.path.expanduser(text)).absolute(), signing_key=key)
    if key is None:
        raise StoreError(
            f"the artifact store {hide_password(text)} needs a signing key, as artifacts are code and others may write "
            f"there: set {KEY_VARIABLE}, or {KEY_FILE_VARIABLE} to a file that only you can read, to the same secret "
            "everywhere"
        )
    folder = f"remote-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return ArtifactStore(root.parent / folder, text, key)


def _own(root: Path, key: SigningKey | None, strict: bool) -> ArtifactStore | None:
    """This user's own store. If it is unsafe, a warning and None unless `strict`: nobody requested it, so nothing may
    fail."""
    try:
        if not root.is_absolute():
            raise StoreError("this user has no home folder; give a cache_dir")
        return ArtifactStore(root, signing_key=key)
    except StoreError as exc:
        if strict:
            raise
        logger.warning("glowplug: every start is cold, as it runs without its store: %s", exc)
        return None
