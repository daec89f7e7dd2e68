"""The stored programs of one model: reads, validates, binds and writes them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from glowplug.compilers.base import StoringCompiler
from glowplug.errors import ArtifactError, NotStorableError
from glowplug.graph.fingerprint import Fingerprint
from glowplug.layers.handle import LayerHandle
from glowplug.layers.registry import LayerRegistry
from glowplug.program import PieceSlot, PieceStore, Program
from glowplug.program.piece_store import Run, unpickled
from glowplug.program.plan import Binder
from glowplug.program.template import tensor_names
from glowplug.reasons import said
from glowplug.store.address import changed_global, changed_source
from glowplug.store.record import Place, Record
from glowplug.store.store import LOCK_TIMEOUT_S, ArtifactStore


@dataclass(frozen=True)
class Stored:
    """A program from the store, bound to a model.

    Attributes:
        record: its record.
        program: the program.
        pieces: the callable of each piece, or its slot while another process compiles it.
        graphs: returns the program with uncompiled pieces, or None if not all of their graphs are stored.
    """

    record: Record
    program: Program
    pieces: Mapping[Fingerprint, Run]
    graphs: Callable[[], Program | None]


@dataclass(frozen=True)
class Records:
    """The stored programs of one model, and its compiled pieces. `about` describes the model to people."""

    model: nn.Module
    about: str
    store: ArtifactStore
    pieces: PieceStore

    @classmethod
    def of(
        cls, model: nn.Module, about: str, store: ArtifactStore, compiler: StoringCompiler, device: torch.device
    ) -> Records:
        """The programs in a store of a model on a device."""
        return cls(model, about, store, PieceStore(store, compiler, compiler.environment(device)))

    def find(self, key: str, registry: LayerRegistry, *, wait: bool) -> Stored | None:
        """The program at an address, bound to the model; None if there is none that can be used. For `wait` see
        `load_pieces`."""
        record = self.read(key)
        loaded = load_pieces(self.pieces, record, wait=wait) if record is not None else None
        if record is None or loaded is None:
            return None
        pieces, graphs = loaded
        try:
            values = {name: _find(self.model, registry, place) for name, place in record.places.items()}
            binder = Binder.of(self.model, record.stack, registry, record.handles) if record.stack is not None else None
            program = record.plan.write(pieces, values, binder)
        except Exception as exc:  # any failure means: build the program again
            self.drop(key, said(exc))
            return None
        return Stored(record, program, pieces, functools.partial(_uncompiled, program, graphs))

    def read(self, key: str) -> Record | None:
        """The record at an address; None if there is none, or if something that it relies on has changed."""
        content = self.store.get("manifest", key)
        if content is None:
            return None
        try:
            record = Record.from_bytes(content)
        except ArtifactError as exc:
            self.drop(key, str(exc))
            return None
        changed = changed_source(record.sources) or changed_global(record.globals)
        if changed is not None:
            self.store.note(f"the stored program is not used: {changed} since; it is built again")
            return None
        return record

    def keep(self, key: str, record: Record) -> None:
        """Store a record, unless an equal one is there that has been compared with eager already; NotStorableError if
        it can't be stored."""
        before = self.read(key)
        # The round trip removes the graphs. `reads` is not compared, as sources have different names in each process.
        stored = Record.from_bytes(record.to_bytes())
        if before is None or replace(stored, reads=before.reads, verified=True) != before:
            self._put(key, stored)

    def lock(self, key: str) -> AbstractContextManager[bool]:
        """Hold the lock of a program."""
        return self.store.lock("manifest", key)

    def drop(self, key: str, why: str) -> None:
        """Delete a program that can't be used."""
        self.store.drop("manifest", key, why)

    def judge(self, key: str, problem: str | None) -> None:
        """Mark a stored program as equal to eager or, given a problem, delete it."""
        if problem is not None:
            self.drop(key, f"it is not equal to eager: {problem}")
        elif (record := self.read(key)) is not None and not record.verified:
            self._put(key, replace(record, verified=True))

    def _put(self, key: str, record: Record) -> None:
        self.store.put("manifest", key, record.to_bytes(), f"{self.about}, {record.facts['strategy']}")


def load_pieces(
    pieces: PieceStore, record: Record, *, wait: bool
) -> tuple[dict[Fingerprint, Run], dict[Fingerprint, bytes]] | None:
    """Every piece of a record, ready to run, and the graphs of those that are compiled, for `unpickled`; None if one is
    missing and no process is compiling it.

    If `wait`, wait for pieces that another process is compiling. Otherwise their slots run uncompiled until then.
    """
    runners: dict[Fingerprint, Run] = {}
    graphs: dict[Fingerprint, bytes] = {}
    for piece, address in record.pieces().items():
        loaded = pieces.load_with_graph(address)
        graph = pieces.load_graph(address) if loaded is None and not wait and pieces.busy(address) else None
        if graph is not None:
            runners[piece] = PieceSlot(piece, graph, pieces, address=address)
            continue
        if loaded is None:
            with pieces.lock(address, LOCK_TIMEOUT_S):
                loaded = pieces.load_with_graph(address)
        if loaded is None:
            return None
        runners[piece], graphs[piece] = loaded
    return runners, graphs


def _uncompiled(program: Program, pickled: Mapping[Fingerprint, bytes]) -> Program | None:
    """A stored program with uncompiled pieces; None if the graph of one can't be read."""
    slots = {piece: run.graph for piece, run in program.slots.items() if isinstance(run, PieceSlot)}
    graphs = slots | {piece: unpickled(graph) for piece, graph in pickled.items()}
    readable = {piece: graph for piece, graph in graphs.items() if graph is not None}
    return program.with_slots(readable) if len(readable) == len(graphs) else None


# -- places ------------------------------------------------------------------------------------------------------


def places_of(model: nn.Module, bound: Mapping[str, Any], unread: Collection[str]) -> dict[str, Place | None]:
    """Graph value -> place of its object in the model; NotStorableError for an object that is not part of the model.

    The values in `unread` stood for sizes in the trace and are never read at run time, so they need no place.
    """
    names = tensor_names(model)
    places: dict[str, Place | None] = {}
    for name, value in bound.items():
        if isinstance(value, LayerHandle):
            places[name] = Place(value.name, is_handle=True)
        elif name in unread:
            places[name] = None
        elif id(value) in names:
            places[name] = Place(names[id(value)][0])
        else:
            raise NotStorableError(f"the program is bound to a {type(value).__name__} ({name}) that is not the model's")
    return places


def _find(model: nn.Module, registry: LayerRegistry, place: Place | None) -> Any:
    if place is None:
        return None
    if place.is_handle:
        return registry.handles[place.path]
    parent, _, leaf = place.path.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)
