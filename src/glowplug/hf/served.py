"""A program that serves calls of a transformers model: what its calls must fulfil, and how they run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from glowplug.errors import NotServableError
from glowplug.graph.shapes import ShapeAssumptions
from glowplug.hf.caches import mask_extent, seen_tokens
from glowplug.hf.call import Call
from glowplug.hf.insides import InUse
from glowplug.hf.masks import mask_sources, takes_padding
from glowplug.hf.positions import Positions
from glowplug.hf.sequences import Running, Sequences
from glowplug.layers.context import ForwardContext, forward_context
from glowplug.layers.registry import LayerRegistry
from glowplug.program import Built, Program, Stamping, try_pieces, with_arrived

PADDING = "L['cache'].padding"
"""Source of the mask that a model makes all others of inside its trace."""
SIZE = re.compile(
    r"L\['(inputs|position_ids|keep)'\]\.size\(\)\[(\d+)\]|L\['cache'\]\.(past\.size\(\)\[0\]|padding\.size\(\)\[[01]\])"
)
"""Sources of sizes that a call gives."""


@dataclass(frozen=True)
class Recipe:
    """What a program was made of, to be stored.

    Attributes:
        built: the program, its plan, and what it is bound to.
        stamping: how it was stamped; None for a full trace.
        files: of all code that was traced.
        unread: graph values that stood for lengths of the cache, and that no run reads.
    """

    built: Built
    stamping: Stamping | None
    files: frozenset[str]
    unread: frozenset[str]


@dataclass
class Served:
    """A program and what its calls must fulfil.

    Attributes:
        program: the program.
        assumptions: what its trace assumed of sizes.
        positions: fills in those that calls leave out.
        cache_argument: the name that the model's forward has for its cache.
        output_type: the class of the model's output.
        uncompiled: the same steps with uncompiled pieces; dropped once it was compared.
        find_uncompiled: finds that in the store, for a program that came from there; None when it is not there.
        checked: sizes of a call -> why they break an assumption, or None.
        recipe: what a later process needs to run it again; None when it came from a store.
        key: its address in the store; None when it is not there.
        proved: whether an earlier process compared it with eager.
        sequences: what each sequence under way runs.
    """

    program: Program
    assumptions: ShapeAssumptions
    positions: Positions
    cache_argument: str
    output_type: type
    uncompiled: Program | None = None
    find_uncompiled: Callable[[], Program | None] | None = None
    checked: dict[tuple[tuple[int, ...], ...], str | None] = field(default_factory=dict)
    recipe: Recipe | None = None
    key: str | None = None
    proved: bool = False
    sequences: Sequences = field(default_factory=Sequences)

    def try_pieces(self, call: Call, registry: LayerRegistry) -> tuple[Any, str | None] | None:
        """Run a call with uncompiled pieces, and compare each compiled piece with its own, see `program.try_pieces`.
        None when there are no uncompiled pieces."""
        if self.uncompiled is None and self.find_uncompiled is not None:
            self.uncompiled, self.find_uncompiled = self.find_uncompiled(), None
        if self.uncompiled is None:
            return None
        return try_pieces(self.program, self.uncompiled, lambda paired: self.run(call, registry, program=paired))

    def begin(self, cache: Cache | None, insides: InUse) -> Running:
        """What a sequence that begins with a cache is to run, to its end: the latest pieces, and these insides."""
        return self.sequences.begin(cache, Running(self.latest, insides))

    @property
    def latest(self) -> Program:
        """The program with every compiled piece that has arrived."""
        self.program = with_arrived(self.program)
        return self.program

    def run(
        self,
        call: Call,
        registry: LayerRegistry,
        *,
        program: Program | None = None,
        insides: Mapping[int, Any] | None = None,
        check_order: bool = True,
    ) -> Any:
        """Run a call that the program can serve; returns what the model's forward would.

        Args:
            call: the call.
            registry: the layers that ops find.
            program: another form of the program; None: the latest.
            insides: id of a layer -> the compiled inside that its op runs.
            check_order: see `ForwardContext`.

        Raises:
            NotServableError: it can't serve it, see `broken_by`.
        """
        reason = self._incomplete(call)
        if reason is not None:
            raise NotServableError(reason)
        program = program or self.program
        with torch.no_grad(), forward_context(ForwardContext(registry, call.cache, check_order, insides or {})):
            (logits,) = program.run(*_arguments(program.arguments, call))
        output = self.output_type(logits=logits, **{self.cache_argument: call.cache})
        return output.to_tuple() if call.return_tuple else output

    def broken_by(self, call: Call) -> str | None:
        """Why a call can't be served; None when it can."""
        incomplete = self._incomplete(call)
        if incomplete is not None:
            return incomplete
        batch, tokens = call.inputs.shape[:2]
        shapes = {
            "L['inputs']": tuple(call.inputs.shape),
            "L['position_ids']": (*call.signature.position_lead, batch, tokens),
        }
        if call.keep is not None:
            shapes["L['keep']"] = tuple(call.keep.shape)
        if self._reads(PADDING):
            shapes[PADDING] = tuple(call.padding.shape)
        key = tuple(shapes.values())
        if key not in self.checked:
            self.checked[key] = self.assumptions.broken_by(shapes)
        return self.checked[key]

    def _incomplete(self, call: Call) -> str | None:
        """Work out what the program reads and the call does not say; or why that can't be done."""
        if call.position_ids is None and self._reads("L['position_ids']"):
            filled = self.positions.fill(call)
            if isinstance(filled, str):
                return filled
            call.position_ids = filled
        if self._reads(PADDING):
            return _make_padding(call, takes_padding(self.positions.model))
        if self._reads("L['cache'].past") and seen_tokens(call.cache) is None:
            return "the cache can't say how many tokens it holds"
        return None

    def _reads(self, source: str) -> bool:
        return any(read.startswith(source) for read in self.program.arguments)


def _make_padding(call: Call, states: bool) -> str | None:
    """Let a call have the mask that its model makes all others of, `[batch, kv_tokens]`; or say why it can't. For
    `states` in the place of keys, a mask says nothing of earlier tokens, and the only token of a step always counts."""
    batch, tokens = call.inputs.shape[:2]
    mask = call.padding
    extent = tokens if states else mask_extent(call.cache, tokens)
    if extent is None:
        return "the model makes its own masks, and the cache's layers don't all keep every token"
    if states and isinstance(mask, Tensor):
        mask = mask[:, -tokens:] if tokens > 1 else None
    if mask is None:
        mask = torch.ones((batch, extent), dtype=torch.long, device=call.inputs.device)
    elif not isinstance(mask, Tensor) or mask.dtype.is_floating_point or tuple(mask.shape) != (batch, extent):
        return f"the model makes its own masks, of a mask of integers of [{batch}, {extent}], and was given another"
    call.padding = mask.to(call.inputs.device, torch.long).contiguous()
    return None


def _arguments(sources: Sequence[str], call: Call) -> list[Any]:
    return [_READERS[source](call) if source in _READERS else _read_other(source, call) for source in sources]


_READERS: dict[str, Any] = {
    "L['inputs']": lambda call: call.inputs,
    "L['position_ids']": lambda call: call.position_ids,
    "L['keep']": lambda call: call.keep,
    PADDING: lambda call: call.padding,
    "L['inputs'].size()[0]": lambda call: call.inputs.shape[0],
    "L['inputs'].size()[1]": lambda call: call.inputs.shape[1],
    "L['keep'].size()[0]": lambda call: call.keep.shape[0],
}


def _read_other(source: str, call: Call) -> Any:
    if source.startswith(PADDING):
        return call.padding.shape[int(source[-2])]
    if source.startswith("L['cache']"):
        return int(seen_tokens(call.cache) or 0)
    size = SIZE.fullmatch(source)
    if size is not None:
        return getattr(call, size[1]).shape[int(size[2])]
    for name, key in mask_sources(call.masks).items():
        if name == source:
            return call.masks if key is None else call.masks[key]  # type: ignore[index]
    raise KeyError(source)
