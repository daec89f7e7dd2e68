"""Bodies in a store, with what their trial found: the way by which another process hands them over."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Sequence
from dataclasses import dataclass

from glowplug.background.job import orphaned
from glowplug.bodies.group import Group
from glowplug.bodies.make import Body, make_body
from glowplug.bodies.trial import Verdict
from glowplug.errors import CaptureError
from glowplug.program import PieceStore
from glowplug.reasons import said
from glowplug.store.address import changed_global

_KIND = "inside"
"""What the store calls them."""
_WAIT_S = 600.0


@dataclass(frozen=True)
class StoredBody:
    """A body as a store keeps it.

    Attributes:
        body: the body.
        artifact: its compiled piece; empty where that has no form on disk.
        verdict: what a trial found; None when nobody has tried it.
    """

    body: Body
    artifact: bytes
    verdict: Verdict | None = None


def _key(pieces: PieceStore, group: Group) -> str:
    return pieces.key(group.address or f"{group.form.op} {group.names[0]}")


def read_body(pieces: PieceStore, group: Group) -> StoredBody | None:
    """A group's body, unless the values that its trace read have changed since."""
    key = _key(pieces, group)
    payload = pieces.store.get(_KIND, key)
    if payload is None:
        return None
    try:
        stored: StoredBody = pickle.loads(payload)
        return stored if changed_global(stored.body.globals) is None else None
    except Exception as exc:  # whatever a stored body raises, it is made anew
        drop_body(pieces, group, exc)
        return None


def drop_body(pieces: PieceStore, group: Group, exc: Exception) -> None:
    """Forget a body that can't be loaded."""
    pieces.store.drop(_KIND, _key(pieces, group), f"it can't be loaded: {said(exc)}")


def keep_body(pieces: PieceStore, group: Group, stored: StoredBody) -> None:
    """Store a body."""
    about = f"{group.form.op}, {type(group.layers[0]).__name__}"
    pieces.store.put(_KIND, _key(pieces, group), pickle.dumps(stored), about)


def make_missing(groups: Sequence[tuple[Group, PieceStore]]) -> None:
    """Make and store those bodies that are not there yet, nor made by another process meanwhile."""
    for group, pieces in groups:
        lock = pieces.store.lock(_KIND, _key(pieces, group), _WAIT_S)
        with contextlib.suppress(CaptureError), lock:
            if read_body(pieces, group) is None:
                body, artifact = make_body(group, pieces.compiler.compile_to_bytes)
                if not orphaned():
                    keep_body(pieces, group, StoredBody(body, artifact))
