"""Finds a model's program in the store, proves that it fits, and keeps what was made anew."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from glowplug.compilers import PieceCompiler
from glowplug.compilers.base import StoringCompiler
from glowplug.errors import ArtifactError, NotStorableError
from glowplug.graph.fingerprint import Fingerprint
from glowplug.hf.call import Signature, cache_argument
from glowplug.hf.experts import ExpertsPlan
from glowplug.hf.interfaces import give_attention_functions
from glowplug.hf.kinds import Slot, Slots
from glowplug.hf.manifests import Manifests, globals_of, places_of, sources_of
from glowplug.hf.positions import Positions
from glowplug.hf.served import Recipe, Served
from glowplug.hf.sharding import Processes
from glowplug.layers.registry import LayerRegistry
from glowplug.options import Options
from glowplug.program import PieceSlot, PieceStore, Program
from glowplug.program.piece_store import Run
from glowplug.reasons import said
from glowplug.report import Report
from glowplug.store.manifest import Manifest, dtype_from_name
from glowplug.store.store import ArtifactStore


@dataclass(frozen=True)
class Warm:
    """A store, and the programs and pieces in it that a model can use.

    Attributes:
        store: the store.
        pieces: its pieces.
        manifests: its programs.
    """

    store: ArtifactStore
    pieces: PieceStore
    manifests: Manifests

    def address(self, signature: Signature, plan: ExpertsPlan, report: Report) -> str | None:
        """The address of the program for calls of a signature; None when the model can't be described."""
        try:
            with report.phase("load"):
                return self.manifests.key(signature, plan)
        except NotStorableError as exc:
            self.store.note(f"the model is not stored: {exc}")
            return None

    def keep(self, key: str, manifest: Manifest) -> None:
        """Store a program; not in the place of the same that was compared already."""
        before = self.manifests.read(key)
        if before is None or not before.verified or not _same(before, manifest):
            self.manifests.keep(key, manifest)

    def judge(self, key: str, problem: str | None) -> None:
        """Write down what came of comparing a program that is in the store."""
        if problem is not None:
            self.store.drop("manifest", key, f"it is not equal to eager: {problem}")
            return
        manifest = self.manifests.read(key)
        if manifest is not None and not manifest.verified:
            self.manifests.keep(key, replace(manifest, verified=True))


def make_warm(
    model: PreTrainedModel,
    options: Options,
    compiler: PieceCompiler,
    store: ArtifactStore | None,
    device: torch.device,
    processes: Processes | None,
) -> Warm | None:
    """None where nothing can be stored: without a store, by a compiler whose pieces have no form on disk, or with
    names in the graphs."""
    if store is None or not isinstance(compiler, StoringCompiler) or options.resolved_identity != "hoisted":
        return None
    pieces = PieceStore(store, compiler, compiler.environment(device))
    return Warm(store, pieces, Manifests(model, options, store, pieces, processes))


@dataclass(frozen=True)
class Found:
    """A program from the store.

    Attributes:
        served: the program.
        manifest: what it was written from.
        runners: its compiled pieces.
        pending: slots of its pieces that another process is compiling.
        slots: what its ops of experts are called with.
    """

    served: Served
    manifest: Manifest
    runners: Mapping[Fingerprint, Run]
    pending: Sequence[PieceSlot]
    slots: dict[str, Slots]


def find(
    warm: Warm,
    key: str,
    model: PreTrainedModel,
    registry: LayerRegistry,
    positions: Positions,
    *,
    wait: bool,
) -> Found | None:
    """The stored program of an address, bound to the model; None when there is none that can be used.

    Args:
        warm: the store.
        key: the address.
        model: the model.
        registry: its layers.
        positions: fills in those that calls leave out.
        wait: for pieces that another process is compiling, see `Manifests.load_pieces`.
    """
    manifest = warm.manifests.read(key)
    loaded = warm.manifests.load_pieces(manifest, wait=wait) if manifest is not None else None
    if manifest is None or loaded is None:
        return None
    runners, pending = loaded
    try:
        if manifest.facts["attention"] == "cut":
            give_attention_functions(model)
        program = warm.manifests.write_program(
            manifest, registry, {**runners, **{slot.fingerprint: slot for slot in pending}}
        )
        names = positions, cache_argument(model)
        served = Served(program, manifest.assumptions, *names, _class(manifest.output_type))
        served.find_uncompiled = functools.partial(_uncompiled, warm, manifest, registry)
        if not manifest.verified:
            served.uncompiled = served.find_uncompiled()
        slots = {op: tuple(map(_slot, entries)) for op, entries in manifest.facts["slots"].items()}
    except Exception as exc:  # whatever comes of a stored program, it is made anew
        warm.store.drop("manifest", key, said(exc))
        return None
    return Found(served, manifest, runners, pending, slots)


def _uncompiled(warm: Warm, manifest: Manifest, registry: LayerRegistry) -> Program | None:
    """A stored program with uncompiled pieces; None when not all of them are stored."""
    graphs = warm.manifests.load_graphs(manifest)
    return warm.manifests.write_program(manifest, registry, graphs) if graphs is not None else None


def describe(
    recipe: Recipe,
    served: Served,
    model: PreTrainedModel,
    reads: Sequence[str],
    slots: Mapping[str, Slots],
    addresses: Mapping[Fingerprint, str],
    report: Report,
    *,
    verified: bool,
) -> Manifest:
    """The manifest of a program that was made here.

    Raises:
        NotStorableError: it can't be stored.
    """
    wanted = recipe.built.plan.values()
    outside = {name: value for name, value in recipe.built.bound.items() if name in wanted}
    facts = {
        "strategy": report.strategy,
        "experts": report.experts,
        "attention": report.attention,
        "template_layers": report.template_layers,
        "slots": {op: [[list(slot.sizes), str(slot.dtype)] for slot in entries] for op, entries in slots.items()},
    }
    return Manifest(
        plan=recipe.built.plan,
        places=places_of(model, outside, recipe.unread),
        stack=recipe.stamping.stack if recipe.stamping is not None else None,
        handles=recipe.stamping.handles if recipe.stamping is not None else frozenset(),
        assumptions=served.assumptions,
        output_type=f"{served.output_type.__module__}:{served.output_type.__qualname__}",
        reads=tuple(sorted(reads)),
        globals=globals_of(reads),
        sources=sources_of(model, recipe.files),
        addresses={found.digest: address for found, address in addresses.items()},
        facts=facts,
        verified=verified,
    )


def _same(stored: Manifest, made: Manifest) -> bool:
    """Whether two manifests run the same. What a trace read of Python has other names in each process."""
    try:
        return replace(Manifest.from_bytes(made.to_bytes()), reads=stored.reads, verified=stored.verified) == stored
    except (NotStorableError, ArtifactError):
        return False


def _class(name: str) -> type:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    if not (isinstance(found, type) and issubclass(found, ModelOutput)):
        raise ArtifactError(f"{name} is no class of outputs")
    return found


def _slot(entry: list[Any]) -> Slot:
    sizes, dtype = entry
    return Slot(tuple(sizes), dtype_from_name(dtype))
