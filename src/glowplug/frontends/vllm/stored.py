"""The stored program of a decoder, in vLLM's cache folder. Nothing in it grows with the decoder's depth."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glowplug.errors import NotStorableError, StoreError
from glowplug.frontends.vllm.calls import DecoderCall
from glowplug.frontends.vllm.layers import SourceBinder, tensors_text
from glowplug.frontends.vllm.log import logger
from glowplug.frontends.vllm.pieces import DecoderCompiler, SplittingOps, vllm_facts
from glowplug.frontends.vllm.private import vllm
from glowplug.frontends.vllm.stamped import Stamped
from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.shapes import ShapeAssumptions
from glowplug.program.piece_store import PieceStore, unpickled
from glowplug.program.template import Template
from glowplug.program.write import Slots
from glowplug.store import ArtifactStore
from glowplug.store.address import address as address_of
from glowplug.store.address import class_modules, globals_of, modules_of, sources_of
from glowplug.store.record import Record
from glowplug.store.records import Records, load_pieces

FOLDER = ("torch_compile_cache", "glowplug")
"""The place of the store in vLLM's cache folder."""


@dataclass(frozen=True)
class Stored:
    """The place of a decoder's program in a store.

    Attributes:
        records: the store's programs and pieces.
        address: the program's address.
        template: the decoder's template.
    """

    records: Records
    address: str
    template: Template

    @classmethod
    def of(
        cls, decoder: Any, call: DecoderCall, template: Template, compiler: DecoderCompiler, ops: SplittingOps
    ) -> Stored | None:
        """The place of the program for calls like this one; None if nothing is to be stored."""
        if vllm().envs.VLLM_DISABLE_COMPILE_CACHE or torch._inductor.config.force_disable_caches:
            return None
        config, stack = decoder.vllm_config, template.stack
        folder = Path(vllm().envs.VLLM_CACHE_ROOT).joinpath(*FOLDER)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor_cache")  # as vLLM does; it has kernels' tuning
        name = type(decoder).__name__
        try:
            store = ArtifactStore(folder)
            environment = compiler.environment(next(decoder.parameters()).device)
            facts = {
                "environment": environment,
                "vllm": vllm_facts(config),
                "rank": [config.parallel_config.rank, config.parallel_config.data_parallel_index],
                "decoder": [type(decoder).__module__, type(decoder).__qualname__, decoder._compile_prefix],
                "call": repr(call.pattern),
                "stack": [stack.path, *map(str, stack.kinds)],
                "tensors": tensors_text(decoder),
                "ops": sorted(ops.names),
            }
        except (StoreError, NotStorableError) as exc:
            logger().warning("glowplug: nothing is stored: %s", exc)
            return None
        about = f"{name}, {len(stack.layers)} layers, vLLM {vllm().version}"
        records = Records(decoder, about, store, PieceStore(store, compiler, environment))
        return cls(records, address_of(facts), template)

    def find(self) -> Stamped | None:
        """The stored program; None if there is none that can be used."""
        record = self.records.read(self.address)
        loaded = load_pieces(self.records.pieces, record, wait=True) if record is not None else None
        if record is None or loaded is None:
            return None
        slots, graphs = loaded
        stack = self.template.stack
        ops = frozenset(slot for slot in slots if slot.digest in record.facts["ops"])
        binder = SourceBinder(stack.path, stack.layers, record.handles, vllm().LayerName)
        how = f"traced none of {len(stack.layers)} layers, loaded {len(slots) - len(ops)} pieces"
        uncompiled = functools.partial(_uncompiled, graphs)
        allocated = {slot: tuple(record.facts["allocated"][slot.digest]) for slot in slots}
        return Stamped(record.plan, slots, uncompiled, binder, record.places, ops, allocated, how, stored=True)

    def keep(self, stamped: Stamped, read: set[str], files: frozenset[str]) -> None:
        """Store a program that was compared with the decoder's own forward."""
        try:
            record = Record(
                plan=stamped.plan,
                places=stamped.outside,
                stack=stamped.binder.stack,
                handles=stamped.binder.names,
                assumptions=ShapeAssumptions({}, ()),
                reads=(),
                globals=globals_of(read),
                sources=sources_of(modules_of(files) | class_modules(self.records.model)),
                addresses={},
                facts={
                    "strategy": "stamped",
                    "ops": [slot.digest for slot in stamped.plan.pieces() if slot in stamped.ops],
                    "allocated": {slot.digest: list(outputs) for slot, outputs in stamped.allocated.items()},
                },
                verified=True,
            )
            self.records.keep(self.address, record)
        except NotStorableError as exc:
            logger().info("glowplug: the program is not stored: %s", exc)

    def drop(self, reason: str) -> None:
        """Delete the stored program."""
        self.records.drop(self.address, reason)


def _uncompiled(graphs: Mapping[Fingerprint, bytes]) -> Slots | None:
    """The uncompiled forms of stored pieces; None if one can't be read."""
    runs = {slot: unpickled(graph) for slot, graph in graphs.items()}
    return {slot: run for slot, run in runs.items() if run is not None} if all(runs.values()) else None
