"""What transformers adds to stored programs: what their addresses name, the class of outputs, calls of experts."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from glowplug.compilers import PieceCompiler
from glowplug.compilers.base import StoringCompiler
from glowplug.errors import ArtifactError
from glowplug.graph.fingerprint import Fingerprint
from glowplug.hf.call import Signature, cache_argument
from glowplug.hf.experts import ExpertsPlan
from glowplug.hf.interfaces import give_attention_functions
from glowplug.hf.kinds import Slot, Slots
from glowplug.hf.manifests import SKIP
from glowplug.hf.positions import Positions
from glowplug.hf.rotary_entry import rotary_layers
from glowplug.hf.served import Recipe, Served
from glowplug.hf.sharding import Processes, world_text
from glowplug.layers.structure import structure_of
from glowplug.options import Options
from glowplug.program import PieceStore
from glowplug.records import Records, Stored, places_of
from glowplug.report import Report
from glowplug.store import ArtifactStore
from glowplug.store.address import class_modules, globals_of, modules_of, sources_of
from glowplug.store.record import Record


def open_records(
    model: PreTrainedModel,
    options: Options,
    compiler: PieceCompiler,
    store: ArtifactStore | None,
    device: torch.device,
) -> Records | None:
    """None where nothing can be stored: without a store, by a compiler whose pieces have no form on disk, or with
    names in the graphs."""
    if store is None or not isinstance(compiler, StoringCompiler) or options.resolved_identity != "hoisted":
        return None
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", "?")
    about = f"{type(model).__name__}, {layers} layers"
    return Records(model, about, store, PieceStore(store, compiler, compiler.environment(device)))


def program_facts(
    model: PreTrainedModel,
    options: Options,
    environment: str,
    signature: Signature,
    plan: ExpertsPlan,
    processes: Processes | None,
) -> dict[str, Any]:
    """What the address of the program for calls of a signature is made of, by name.

    Raises:
        NotStorableError: the model can't be described.
    """
    return {
        "structure of the model": structure_of(model, SKIP, followed=rotary_layers(model).values()),
        "code of the model": {f"source of {name}": text for name, text in sources_of(class_modules(model)).items()},
        "environment": environment,
        "transformers": transformers.__version__,
        "call": repr(replace(signature, device=torch.device(signature.device.type))),
        "number of the device": signature.device.index or 0,  # pieces hold the device that they run on
        "processes": world_text(processes),
        "experts": [plan.kind, plan.implementation, sorted(plan.blocks), sorted(plan.routed)],
        "options": [options.resolved_identity, options.stamp],
    }


def serve_stored(stored: Stored, key: str, model: PreTrainedModel, positions: Positions) -> Served:
    """A program from the store, to serve calls."""
    record = stored.record
    if record.facts["attention"] == "cut":
        give_attention_functions(model)
    output: Any = pkgutil.resolve_name(record.output_type)
    if not (isinstance(output, type) and issubclass(output, ModelOutput)):
        raise ArtifactError(f"{record.output_type} is no class of outputs")
    served = Served(stored.program, record.assumptions, positions, cache_argument(model), output, stored.ends)
    served.find_uncompiled = stored.find_uncompiled
    if not record.verified:
        served.uncompiled = stored.find_uncompiled()
    served.key, served.proved = key, record.verified
    return served


def slots_of(record: Record) -> dict[str, Slots]:
    """What a stored program's ops of experts are called with."""
    return {op: tuple(Slot(*entry) for entry in entries) for op, entries in record.facts["slots"].items()}


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
) -> Record:
    """The record of a program that was made here.

    Raises:
        NotStorableError: it can't be stored.
    """
    wanted = recipe.built.plan.values()
    outside = {name: value for name, value in recipe.built.bound.items() if name in wanted}
    stamping = recipe.stamping
    return Record(
        plan=recipe.built.plan,
        places=places_of(model, outside, recipe.unread),
        stack=stamping.stack if stamping is not None else None,
        handles=stamping.handles if stamping is not None else frozenset(),
        assumptions=served.assumptions,
        output_type=f"{served.output_type.__module__}:{served.output_type.__qualname__}",
        reads=tuple(sorted(reads)),
        globals=globals_of(reads),
        sources=sources_of(modules_of(recipe.files) - class_modules(model)),
        addresses={piece.digest: address for piece, address in addresses.items()},
        facts={
            **{name: getattr(report, name) for name in ("strategy", "experts", "attention", "template_layers")},
            "slots": {op: [(slot.sizes, slot.dtype) for slot in entries] for op, entries in slots.items()},
        },
        verified=verified,
    )
