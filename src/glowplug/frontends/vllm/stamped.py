"""A decoder's stamped program before it is bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from glowplug.frontends.vllm.calls import MODEL
from glowplug.frontends.vllm.layers import Bound, SourceBinder
from glowplug.frontends.vllm.private import vllm
from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.sources import parse
from glowplug.graph.stamp import Own
from glowplug.program.plan import Plan
from glowplug.program.program import Program
from glowplug.program.write import Slots, Wrap
from glowplug.store.record import Place


@dataclass(frozen=True)
class Stamped:
    """What a start gives.

    Attributes:
        plan: how the deep decoder runs.
        slots: the callable of each distinct piece.
        graphs: gives their uncompiled forms, or None where some are missing.
        binder: finds what the plan needs in the layers.
        outside: graph value -> its place, for what is bound outside the layers.
        ops: the slots that are splitting ops.
        allocated: slot -> its outputs that are memory without content, which a splitting op fills.
        how: what was done, for the log.
        stored: whether it came from the store.
        returns: the structure of what the decoder returns; None for a single tensor. Known once it was compared.
    """

    plan: Plan
    slots: Slots
    graphs: Callable[[], Slots | None]
    binder: SourceBinder
    outside: Mapping[str, Place | None]
    ops: frozenset[Fingerprint]
    allocated: Mapping[Fingerprint, tuple[int, ...]]
    how: str
    stored: bool = False
    returns: Any = None

    @property
    def depth(self) -> int:
        """The number of layers."""
        return len(self.binder.layers)

    def write(self, decoder: nn.Module, wrap: Wrap | None = None) -> Program:
        """The program, bound to what the decoder holds now."""
        values = {name: find(decoder, place) for name, place in self.outside.items() if place is not None}
        return self.plan.write(self.slots, values, self.binder.of(decoder), wrap)

    def bound(self, decoder: nn.Module) -> Bound:
        """What the program is bound to now."""
        bound = Bound()
        layers = self.binder.of(decoder).layers
        at = "".join(f"._modules[{part!r}]" for part in self.binder.stack.split(".") if part)
        for layer in range(len(layers)):
            source = parse(f"L['decoder']{at}._modules['{layer}']")
            assert source is not None
            bound.add(decoder, source)
        for place in self.outside.values():
            source = parse(place.path) if place is not None and not place.is_handle else None
            if source is not None:
                bound.add(decoder, source)
        for deep in self.plan.deep:
            for own in deep.inputs.values():
                if isinstance(own, Own) and deep.layer is not None:
                    source = parse(f"L['layer']{own.path}")
                    assert source is not None
                    bound.add(layers[deep.layer + own.offset], source)
        return bound


def find(decoder: nn.Module, place: Place) -> Any:
    """The object at a place outside the layers, or in all of them alike."""
    if place.is_handle:
        return vllm().LayerName(place.path)
    source = parse(place.path)
    assert source is not None
    return source.value({MODEL: decoder})
