"""A store at any fsspec URL, such as `s3://bucket/folder`. Anyone who can write there could plant code, so unsigned
artifacts are refused."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import fsspec

from glowplug.errors import ArtifactError, StoreError, UnsignedArtifactError
from glowplug.store.envelope import SigningKey, unpack

_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 2}}}
}
"""Short timeouts: an unreachable store must not delay a start for minutes."""


def hide_password(url: str) -> str:
    """A URL without its user name and password."""
    return re.sub("://[^/@]*@", "://", url)


class RemoteStore:
    """Artifacts at a URL. A failure never stops a start: it is passed to `note`.

    Args:
        url: any URL that fsspec supports. The bucket or folder exists, or the first write creates it.
        signing_key: signs artifacts on write and verifies them on read.
        note: receives each problem, in words.

    Raises:
        StoreError: the protocol is unknown, or needs a package that is not installed.
    """

    def __init__(self, url: str, signing_key: SigningKey, note: Callable[[str], None]) -> None:
        self.url = url
        self.signing_key = signing_key
        self.note = note
        self.shown = hide_password(url)
        self._given_up: set[str] = set()
        self._process = -1
        try:
            self._path("", "")
        except (ImportError, ValueError) as exc:
            raise StoreError(f"the artifact store {self.shown} can't be used: {exc}") from exc
        except Exception as exc:  # some file systems connect at once, and raise errors of their own
            self._give_up("read", exc)
            self._give_up("written to", exc)

    def _path(self, kind: str, key: str) -> str:
        """The path of an artifact. Opens the file system once per process, as connections do not survive a fork."""
        if self._process != os.getpid():
            protocol = self.url.partition("://")[0]
            self._files, self._root = fsspec.core.url_to_fs(self.url, **_OPTIONS.get(protocol, {}))
            self._process = os.getpid()
        return f"{self._root.rstrip('/')}/{kind}s/{key[:2]}/{key}.glow"

    def read(self, kind: str, key: str) -> bytes | None:
        """The verified envelope of an artifact; None if it is missing or can't be trusted."""
        if "read" in self._given_up:
            return None
        try:
            path = self._path(kind, key)
            content: bytes = self._files.cat_file(path)
        except FileNotFoundError:
            return None
        except Exception as exc:  # each file system raises errors of its own
            self._give_up("read", exc)
            return None
        what = f"the {kind} {key[:12]} of {self.shown}"
        try:
            unpack(content, kind, key, self.signing_key)
        except UnsignedArtifactError as exc:
            self.note(f"REFUSED {what}: {exc}. Nothing of it was loaded; it is built again")
            return None
        except ArtifactError as exc:
            self.note(f"{what} is not used: {exc}; it is built again")
            return None
        return content

    def write(self, kind: str, key: str, content: bytes) -> bool:
        """Store a signed envelope; returns whether that worked."""
        if "written to" in self._given_up:
            return False
        try:
            path = self._path(kind, key)
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._files.pipe_file(path, content)
        except Exception as exc:
            self._give_up("written to", exc)
            return False
        return True

    def _give_up(self, what: str, exc: Exception) -> None:
        """Stop reads or writes in this process, as each attempt might take as long. One may fail and the other work."""
        self._given_up.add(what)
        why = f"{type(exc).__name__}: {exc}"[:300]
        self.note(f"the artifact store {self.shown} can't be {what} ({why}); this process continues without it")
