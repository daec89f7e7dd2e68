"""The stored form of a program: its plan, the places of the objects it is bound to, and what its trace relied on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glowplug.errors import ArtifactError
from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.shapes import ShapeAssumptions
from glowplug.program.plan import Plan
from glowplug.store.codec import codec

SCHEMA = 2


@dataclass(frozen=True)
class Place:
    """Where a program finds a bound object in the model: the name of a tensor, or of a layer's handle."""

    path: str
    is_handle: bool = False


@dataclass(frozen=True)
class Record:
    """A trace without graphs. With it, a later process starts with neither a trace nor a compiler.

    Attributes:
        plan: how the program runs.
        places: graph value -> place of its object, for objects outside the layer stack; None for a value never read.
        stack: qualified name of the layer stack of a stamped model; None for a full trace.
        handles: paths in a layer that are handles.
        assumptions: what the trace assumed about sizes.
        reads: sources of everything in Python that the trace depended on.
        globals, sources: values and files of Python modules that the trace read, see `glowplug.store.address`.
        addresses: digest of a piece -> its address in the store, if that differs from the digest.
        facts: contents of the report, and whatever else the front end needs.
        verified: whether the program has been compared with eager.
    """

    plan: Plan
    places: Mapping[str, Place | None]
    stack: str | None
    handles: frozenset[str]
    assumptions: ShapeAssumptions
    reads: tuple[str, ...]
    globals: Mapping[str, str]
    sources: Mapping[str, str]
    addresses: Mapping[str, str]
    facts: Mapping[str, Any]
    verified: bool

    def pieces(self) -> dict[Fingerprint, str]:
        """Each distinct piece, in order of first use -> its address in the store."""
        return {piece: self.addresses.get(piece.digest, piece.digest) for piece in self.plan.pieces()}

    def to_bytes(self) -> bytes:
        """The stored form; NotStorableError if something in the record has none."""
        return json.dumps({"schema": SCHEMA, **codec(Record)[0](self)}, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Record:
        """Read the stored form without running code from it.

        Raises:
            ArtifactError: the content is malformed, or names an op that this process does not know.
        """
        try:
            body = json.loads(content)
            if body["schema"] != SCHEMA:
                raise ArtifactError(f"it is of schema {body['schema']}, and this glowplug reads {SCHEMA}")
            record: Record = codec(Record)[1](body)
            return record
        except ArtifactError:
            raise
        except Exception as exc:  # malformed content can raise anything
            raise ArtifactError(f"it can't be read: {type(exc).__name__}: {exc}"[:200]) from exc
