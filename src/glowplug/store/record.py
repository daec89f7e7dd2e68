"""What the store keeps of a program: its plan, where the objects that it is bound to lie, what its trace relied on."""

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
    """Where an object that a program is bound to lies: the name of a tensor of the model, or of a layer's handle."""

    path: str
    is_handle: bool = False


@dataclass(frozen=True)
class Record:
    """A trace without graphs, by which a later process starts with neither a trace nor a compiler.

    Attributes:
        plan: how the program runs.
        places: graph value -> where its object lies, for what lies outside the stack; None for one that nobody reads.
        stack: qualified name of the stack of a stamped model; None for a full trace.
        handles: paths in a layer that are handles.
        assumptions: what the trace assumed of sizes.
        reads: sources of everything in Python that the trace depended on.
        globals, sources: values and files of Python modules among them, see `glowplug.store.address`.
        addresses: digest of a piece -> what the store knows it by, where that is not the digest.
        facts: what the report says of it, and whatever else a front end needs.
        verified: whether it was compared with eager.
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
        """Each distinct piece, in the order of first use -> what the store knows it by."""
        return {piece: self.addresses.get(piece.digest, piece.digest) for piece in self.plan.pieces()}

    def to_bytes(self) -> bytes:
        """Its form on disk.

        Raises:
            NotStorableError: something in it has none.
        """
        return json.dumps({"schema": SCHEMA, **codec(Record)[0](self)}, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Record:
        """Read its form on disk. Runs no code of it.

        Raises:
            ArtifactError: it is none, or names an op that this process does not know.
        """
        try:
            body = json.loads(content)
            if body["schema"] != SCHEMA:
                raise ArtifactError(f"it is of schema {body['schema']}, and this glowplug reads {SCHEMA}")
            found: Record = codec(Record)[1](body)
            return found
        except ArtifactError:
            raise
        except Exception as exc:  # whatever somebody has written there
            raise ArtifactError(f"it can't be read: {type(exc).__name__}: {exc}"[:200]) from exc
