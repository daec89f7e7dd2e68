"""The stored programs of one model: found, proved to fit, bound to the model, and kept."""

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
from glowplug.program.piece_store import Run
from glowplug.program.plan import Binder
from glowplug.program.template import tensor_names
from glowplug.reasons import said
from glowplug.store.address import changed_global, changed_source
from glowplug.store.record import Place, Record
from glowplug.store.store import ArtifactStore

_WAIT_S = 600.0


@dataclass(frozen=True)
class Stored:
    """A program from the store, bound to a model.

    Attributes:
        record: what it was written from.
        program: the program.
        pieces: what runs each piece: its code, or its slot while another process compiles it.
        graphs: gives the program with uncompiled pieces; None when not all of them are stored.
    """

    record: Record
    program: Program
    pieces: Mapping[Fingerprint, Run]
    graphs: Callable[[], Program | None]


@dataclass(frozen=True)
class Records:
    """The stored programs of one model.

    Attributes:
        model: the model.
        about: what it is, for people.
        store: where its programs are kept.
        pieces: its compiled pieces.
    """

    model: nn.Module
    about: str
    store: ArtifactStore
    pieces: PieceStore

    @classmethod
    def of(
        cls, model: nn.Module, about: str, store: ArtifactStore, compiler: StoringCompiler, device: torch.device
    ) -> Records:
        """Those in a store, of a model on a device."""
        return cls(model, about, store, PieceStore(store, compiler, compiler.environment(device)))

    def find(self, key: str, registry: LayerRegistry, *, wait: bool) -> Stored | None:
        """The program of an address, bound to the model; None when there is none that can be used.

        Args:
            key: the address.
            registry: the model's layers.
            wait: see `load_pieces`.
        """
        record = self.read(key)
        pieces = load_pieces(self.pieces, record, wait=wait) if record is not None else None
        if record is None or pieces is None:
            return None
        try:
            program = self._write(record, registry, pieces)
        except Exception as exc:  # whatever comes of a stored program, it is made anew
            self.drop(key, said(exc))
            return None
        return Stored(record, program, pieces, functools.partial(self._graphs, record, program))

    def read(self, key: str) -> Record | None:
        """The record of an address, if everything that it relies on is as it was."""
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
            self.store.note(f"the stored program is not used: {changed} since; it is made anew")
            return None
        return record

    def keep(self, key: str, record: Record) -> None:
        """Store a program; not in the place of the same that was compared already.

        Raises:
            NotStorableError: it can't be stored.
        """
        before = self.read(key)
        # Without its graphs. What a trace read of Python has other names in each process.
        made = Record.from_bytes(record.to_bytes())
        if before is None or replace(made, reads=before.reads, verified=True) != before:
            self._put(key, made)

    def lock(self, key: str) -> AbstractContextManager[bool]:
        """Hold the lock of a program."""
        return self.store.lock("manifest", key, _WAIT_S)

    def drop(self, key: str, why: str) -> None:
        """Forget a program that turned out to be of no use."""
        self.store.drop("manifest", key, why)

    def judge(self, key: str, problem: str | None) -> None:
        """Write down what came of comparing a program that is in the store."""
        if problem is not None:
            self.drop(key, f"it is not equal to eager: {problem}")
        elif (record := self.read(key)) is not None and not record.verified:
            self._put(key, replace(record, verified=True))

    def _put(self, key: str, record: Record) -> None:
        self.store.put("manifest", key, record.to_bytes(), f"{self.about}, {record.facts['strategy']}")

    def _write(self, record: Record, registry: LayerRegistry, slots: Mapping[Fingerprint, Run]) -> Program:
        values = {name: _find(self.model, registry, place) for name, place in record.places.items()}
        binder = Binder.of(self.model, record.stack, registry, record.handles) if record.stack is not None else None
        return record.plan.write(slots, values, binder)

    def _graphs(self, record: Record, program: Program) -> Program | None:
        graphs = {piece: self.pieces.load_graph(address) for piece, address in record.pieces().items()}
        found = {piece: graph for piece, graph in graphs.items() if graph is not None}
        return program.with_slots(found) if len(found) == len(graphs) else None


def load_pieces(pieces: PieceStore, record: Record, *, wait: bool) -> dict[Fingerprint, Run] | None:
    """Every piece of a record, ready to run; None when one is missing that nobody is compiling.

    Args:
        pieces: the store's.
        record: of the program.
        wait: for pieces that another process is compiling. Otherwise their slots run them uncompiled for now.
    """
    runners: dict[Fingerprint, Run] = {}
    for piece, address in record.pieces().items():
        run = pieces.load(address)
        graph = pieces.load_graph(address) if run is None and not wait and pieces.busy(address) else None
        if graph is not None:
            run = PieceSlot(piece, graph, pieces, address=address)
        if run is None:
            with pieces.lock(address, _WAIT_S):
                run = pieces.load(address)
        if run is None:
            return None
        runners[piece] = run
    return runners


# -- where objects lie -------------------------------------------------------------------------------------------


def places_of(model: nn.Module, bound: Mapping[str, Any], unread: Collection[str]) -> dict[str, Place | None]:
    """Where the objects that a program is bound to lie.

    Args:
        model: the model.
        bound: graph value -> object.
        unread: graph values that stood for sizes in the trace, and that no run reads.

    Raises:
        NotStorableError: one is not found in the model.
    """
    names = tensor_names(model)
    places: dict[str, Place | None] = {}
    for value, held in bound.items():
        if isinstance(held, LayerHandle):
            places[value] = Place(held.name, is_handle=True)
        elif value in unread:
            places[value] = None
        elif id(held) in names:
            places[value] = Place(names[id(held)][0])
        else:
            raise NotStorableError(f"the program is bound to a {type(held).__name__} ({value}) that is not the model's")
    return places


def _find(model: nn.Module, registry: LayerRegistry, place: Place | None) -> Any:
    if place is None:
        return None
    if place.is_handle:
        return registry.handles[place.path]
    parent, _, leaf = place.path.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)
