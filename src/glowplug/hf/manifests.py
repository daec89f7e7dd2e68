"""Warm starts: a model's program is found in the store, and neither Dynamo nor a compiler runs."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import sysconfig
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from glowplug.errors import ArtifactError, NotStorableError
from glowplug.graph.fingerprint import Fingerprint
from glowplug.hf.call import Signature
from glowplug.hf.experts import ExpertsPlan
from glowplug.hf.rotary_entry import rotary_layers
from glowplug.hf.sharding import Processes, world_text
from glowplug.layers.handle import LayerHandle
from glowplug.layers.registry import LayerRegistry
from glowplug.layers.sources import follow, parse_source
from glowplug.layers.stack import LayerStack
from glowplug.layers.structure import structure_of
from glowplug.layers.watch import is_own
from glowplug.options import Options
from glowplug.program import PieceSlot, PieceStore, Program
from glowplug.program.piece_store import Run
from glowplug.program.template import binder, tensor_names
from glowplug.reasons import said
from glowplug.store.manifest import Manifest, Place
from glowplug.store.store import ArtifactStore

SKIP = frozenset(
    {
        "_commit_hash",
        "_ep_plan",
        "_experts_implementation_internal",
        "_fsdp_plan",
        "_is_hf_initialized",
        "_keep_in_fp32_modules",
        "_keep_in_fp32_modules_strict",
        "_keys_to_ignore_on_load_missing",
        "_keys_to_ignore_on_load_unexpected",
        "_keys_to_ignore_on_save",
        "_name_or_path",
        "_no_split_modules",
        "_output_attentions",
        "_pp_plan",
        "_skip_keys_device_placement",
        "_tp_plan",
        "_use_kernels",
        "_weight_conversions",
        "all_tied_weights_keys",
        "architectures",
        "dtype",
        "generation_config",
        "hf_device_map",
        "id2label",
        "kernel_config",
        "label2id",
        "loss_type",
        "name_or_path",
        "rope_deltas",
        "transformers_version",
        "transformers_weights",
        "_glowplug_attention_fn",
    }
)
"""Attributes of transformers' models and configurations that say how to load or train a model, not how it computes."""
_WAIT_S = 600.0


@dataclass(frozen=True)
class Trace:
    """What a trace relied on.

    Attributes:
        files: of all code that was traced.
        reads: sources of everything in Python that it depended on.
    """

    files: frozenset[str]
    reads: frozenset[str]


class Manifests:
    """The stored programs of one model.

    Args:
        model: the model.
        options: how it is compiled.
        store: where programs are kept.
        pieces: its compiled pieces.
        processes: those that run the model together, if it is not this one alone.

    Attributes:
        facts: what the latest address was made of, by name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: Options,
        store: ArtifactStore,
        pieces: PieceStore,
        processes: Processes | None,
    ) -> None:
        self.processes = processes
        self.model = model
        self.options = options
        self.store = store
        self.pieces = pieces
        self.facts: dict[str, Any] = {}

    def key(self, signature: Signature, plan: ExpertsPlan) -> str:
        """The address of the program for calls of a signature.

        Raises:
            NotStorableError: the model can't be described.
        """
        self.facts = {
            "structure of the model": structure_of(self.model, SKIP, followed=rotary_layers(self.model).values()),
            "environment": self.pieces.environment,
            "transformers": transformers.__version__,
            "call": repr(replace(signature, device=torch.device(signature.device.type))),
            "number of the device": signature.device.index or 0,  # pieces hold the device that they run on
            "processes": world_text(self.processes),
            "experts": [plan.kind, plan.implementation, sorted(plan.blocks), sorted(plan.routed)],
            "options": [self.options.resolved_identity, self.options.stamp],
        }
        return hashlib.sha256(json.dumps(self.facts).encode()).hexdigest()

    def read(self, key: str) -> Manifest | None:
        """The stored manifest, if everything that it relies on is as it was."""
        content = self.store.get("manifest", key)
        if content is None:
            return None
        try:
            manifest = Manifest.from_bytes(content)
        except ArtifactError as exc:
            self.store.drop("manifest", key, str(exc))
            return None
        changed = _changed_source(manifest.sources) or changed_global(manifest.globals)
        if changed is not None:
            self.store.note(f"the stored program is not used: {changed} since; it is made anew")
            return None
        return manifest

    def load_pieces(self, manifest: Manifest, *, wait: bool) -> tuple[dict[Fingerprint, Run], list[PieceSlot]] | None:
        """Every piece of a manifest, ready to run; None when one is missing that nobody is compiling.

        Args:
            manifest: of the program.
            wait: for pieces that another process is compiling. Otherwise they are deferred, and run uncompiled for now.
        """
        runners, slots = {}, []
        for found in manifest.plan.pieces():
            address = manifest.addresses.get(found.digest, found.digest)
            run = self.pieces.load(address)
            graph = self.pieces.load_graph(address) if run is None and not wait and self.pieces.busy(address) else None
            if graph is not None:
                slots.append(PieceSlot(found, graph, self.pieces, address=address))
                continue
            if run is None:
                with self.pieces.lock(address, _WAIT_S):
                    run = self.pieces.load(address)
            if run is None:
                return None
            runners[found] = run
        return runners, slots

    def load_graphs(self, manifest: Manifest) -> dict[Fingerprint, Run] | None:
        """Every piece uncompiled, to compare with eager closely; None when one has no graph in the store."""
        addresses = manifest.addresses
        graphs = {
            found: self.pieces.load_graph(addresses.get(found.digest, found.digest)) for found in manifest.plan.pieces()
        }
        return {k: v for k, v in graphs.items() if v is not None} if None not in graphs.values() else None

    def write_program(self, manifest: Manifest, registry: LayerRegistry, runners: Mapping[Any, Any]) -> Program:
        """Bind a stored program to the model.

        Raises:
            ArtifactError: an object that it is bound to is not there.
        """
        model = self.model
        try:
            values = {name: _find(model, registry, place) for name, place in manifest.places.items()}
            bind, name_of = None, None
            if manifest.stack is not None:
                layers: Any = model.get_submodule(manifest.stack)
                stack = LayerStack(manifest.stack, tuple(layers), ())
                bind, name_of = binder(stack, registry, manifest.handles), stack.name_of
            program = manifest.plan.write(runners, values, bind)
        except (AttributeError, KeyError, IndexError) as exc:
            raise ArtifactError(f"it does not fit the model: {said(exc)}") from exc
        return replace(program, outline=manifest.plan.whole_outline(name_of))

    def keep(self, key: str, manifest: Manifest) -> None:
        """Store a manifest."""
        try:
            content = manifest.to_bytes()
        except NotStorableError as exc:
            self.store.note(f"the program is not stored: {exc}")
            return
        layers = getattr(self.model.config.get_text_config(), "num_hidden_layers", "?")
        about = f"{type(self.model).__name__}, {layers} layers, {manifest.facts['strategy']}"
        self.store.put("manifest", key, content, about)


def places_of(model: nn.Module, bound: Mapping[str, Any], unread: Collection[str]) -> dict[str, Place]:
    """Where the objects that a program is bound to lie.

    Args:
        model: the model.
        bound: graph value -> object.
        unread: graph values that stood for sizes in the trace, and that no run reads.

    Raises:
        NotStorableError: one is not found in the model.
    """
    names = tensor_names(model)
    places = {}
    for value, held in bound.items():
        if isinstance(held, LayerHandle):
            places[value] = Place("handle", held.name)
        elif value in unread:
            places[value] = Place("unread", "")
        elif id(held) in names:
            places[value] = Place("tensor", names[id(held)][0])
        else:
            raise NotStorableError(f"the program is bound to a {type(held).__name__} ({value}) that is not the model's")
    return places


def _find(model: nn.Module, registry: LayerRegistry, place: Place) -> Any:
    if place.kind == "handle":
        return registry.handles[place.path]
    if place.kind == "unread":
        return None
    parent, _, leaf = place.path.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)


# -- what a trace relied on --------------------------------------------------------------------------------------


def sources_of(model: nn.Module, files: Iterable[str]) -> dict[str, str]:
    """Name of each Python module whose code was traced, or has a class of the model -> SHA-256 of its file. Not of
    torch and Python's own, whose versions a program's address names.

    Raises:
        NotStorableError: code that was traced is in no file.
    """
    known = (str(Path(torch.__file__).parent) + os.sep, "<frozen ", "<string>")
    library = sysconfig.get_paths()["stdlib"] + os.sep
    by_file = {file: name for name, module in list(sys.modules.items()) if (file := getattr(module, "__file__", None))}
    wanted = set(files)
    for cls in {type(module) for module in model.modules()}:
        wanted |= {
            file
            for base in cls.__mro__
            if (file := getattr(sys.modules.get(base.__module__), "__file__", None)) and base is not object
        }
    found = {}
    for file in sorted(file for file in wanted if not file.startswith(known)):
        if file.startswith(library) and "site-packages" not in file:
            continue
        name = by_file.get(file)
        digest = _digest(file)
        if name is None or digest is None:
            raise NotStorableError(f"code was traced that is in no Python module's file: {file}")
        found[name] = digest
    return found


def _digest(file: str) -> str | None:
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError:
        return None


def _changed_source(sources: Mapping[str, str]) -> str | None:
    for name, digest in sources.items():
        module = sys.modules.get(name)
        if module is None:
            try:
                module = importlib.import_module(name)
            except Exception:  # whatever importing it raises
                return f"the Python module {name} is gone"
        file = getattr(module, "__file__", None)
        if file is None or _digest(file) != digest:
            return f"the source of {name} was changed"
    return None


def globals_of(reads: Iterable[str]) -> dict[str, str]:
    """Source of each plain value and function of Python modules, or of objects in them, that a trace read -> the value,
    as text that is the same in every process."""
    values = ((source, _global(source)) for source in sorted(reads))
    return {source: text for source, text in values if text is not None}


def _global(text: str) -> str | None:
    source = parse_source(text)
    if source is None or not source.is_global or is_own(source.root):
        return None
    try:
        value = follow(sys.modules[source.root], source.path)[-1]
    except (AttributeError, LookupError, TypeError):
        return "missing"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    code = getattr(value, "__code__", None)
    if code is None or is_own(getattr(value, "__module__", None) or ""):
        return None
    constants = tuple(constant for constant in code.co_consts if not isinstance(constant, types.CodeType))
    content = hashlib.sha256(repr((code.co_code, constants, code.co_names)).encode()).hexdigest()[:16]
    return f"{value.__module__}.{value.__qualname__} {content}"


def changed_global(values: Mapping[str, str]) -> str | None:
    """Which of the values that `globals_of` wrote down is another one here, in words; None when none is."""
    for source, text in values.items():
        if _global(source) != text:
            return f"{source} was {text}, and has changed"
    return None
