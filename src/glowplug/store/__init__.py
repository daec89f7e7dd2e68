"""A content-addressed store of artifacts: a local folder, optionally backed by any fsspec URL."""

from glowplug.store.envelope import SigningKey
from glowplug.store.local import Entry, LocalStore
from glowplug.store.opening import open_store
from glowplug.store.remote import RemoteStore
from glowplug.store.store import ArtifactStore

__all__ = ["ArtifactStore", "Entry", "LocalStore", "RemoteStore", "SigningKey", "open_store"]
