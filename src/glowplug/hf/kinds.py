"""Layers that one compiled inside serves: what it is to compute, on what it is traced, and on what it is tried."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from glowplug.graph.capture import Captured
from glowplug.hf.interfaces import has_hooks
from glowplug.layers.stack import describe_layers
from glowplug.ops.inside import Inside
from glowplug.ops.layer_op import find_layer_op

OPS = ("glowplug::moe_forward", "glowplug::moe_forward_shared")
_GATHERED = 2**28
"""Bytes of gathered weights in a trial, at most: on a CPU the compiled inside gathers those of each token's experts."""


@dataclass(frozen=True)
class Made:
    """A compiled inside, unbound.

    Attributes:
        run: the callable; None where it is not loaded.
        order: see `Inside`.
        seconds: what it took.
        artifact: its form on disk, where there is one.
        reads: sources of what its trace read, of the layer (`L['layer']...`) and of globals.
        globals: the plain values that it read of Python modules, as text.
    """

    run: Any
    order: tuple[str, ...]
    seconds: float
    artifact: bytes | None = None
    reads: tuple[str, ...] = ()
    globals: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind(ABC):
    """Layers that one compiled inside serves.

    Attributes:
        op: the op that they are called by.
        names: their qualified names.
        layers: themselves.
        described: everything that their forward could read when the kind was told, hashed: the same for all of them.
    """

    op: str
    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    described: str

    @property
    @abstractmethod
    def facts(self) -> str:
        """What the inside depends on besides the layer's structure."""

    @property
    def files(self) -> Sequence[str]:
        """Files of code that is traced, other than the layer's own."""
        return ()

    @abstractmethod
    def function(self) -> Callable[..., Tensor]:
        """What the op computes by the layer's own code: a function of `layer`, `a0`, `a1`, ..., to be traced."""

    @abstractmethod
    def examples(self, device: torch.device) -> tuple[Tensor, ...]:
        """Tensors to trace it with."""

    @abstractmethod
    def trial(self, tokens: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...] | None:
        """Random tensors of so many tokens to try it with; None for more than a trial should take."""

    def more_trials(self, generator: torch.Generator, device: torch.device) -> list[tuple[Tensor, ...]]:
        """Tensors of other sizes, on which it must be right."""
        return []

    @abstractmethod
    def check(self, captured: Captured) -> None:
        """Refuse an inside whose trace relied on sizes that calls need not have.

        Raises:
            CaptureError: it did.
        """

    @property
    def changed(self) -> bool:
        """Whether a layer is no longer what it was when the kind was told."""
        return any(found != self.described for found in describe_layers(self.layers))

    @abstractmethod
    def bind(self, made: Made, layer: nn.Module, tokens: int | None) -> Inside:
        """The inside of one layer, to serve up to so many tokens."""


@dataclass(frozen=True)
class Slot:
    """One tensor that an op of experts is called with: its sizes (None for one that varies), and its dtype."""

    sizes: tuple[int | None, ...]
    dtype: torch.dtype

    def example(self, tokens: int, device: torch.device) -> Tensor:
        """A tensor of zeros of that form; the last of the sizes that vary is the number of tokens, others are 2."""
        varying = [dim for dim, size in enumerate(self.sizes) if size is None]
        sizes = [2 if size is None else size for size in self.sizes]
        if varying:
            sizes[varying[-1]] = tokens
        tensor = torch.zeros(sizes, dtype=self.dtype, device=device)
        for dim in varying:
            torch._dynamo.mark_dynamic(tensor, dim)
        return tensor


Slots = tuple[Slot, ...]


def read_slots(captured: Captured) -> dict[str, Slots]:
    """What each op of experts is called with, by name of the op."""
    found: dict[str, Slots] = {}
    for node in captured.gm.graph.nodes:
        op = find_layer_op(node.target) if node.op == "call_function" else None
        if op is not None and op.name in OPS:
            found.setdefault(op.name, tuple(_slot(arg) for arg in node.args[1:] if arg is not None))
    return found


def _slot(arg: Any) -> Slot:
    fake = arg.meta["example_value"]
    return Slot(tuple(size if isinstance(size, int) else None for size in fake.shape), fake.dtype)


@dataclass(frozen=True)
class ExpertsKind(Kind):
    """Opaque experts of a kind.

    Attributes:
        slots: what the op is called with.
    """

    slots: Slots = ()

    @property
    def facts(self) -> str:
        """See `Kind.facts`."""
        return repr(self.slots)

    def function(self) -> Callable[..., Tensor]:
        """See `Kind.function`."""
        return _BY_COUNT[len(self.slots)]

    def examples(self, device: torch.device) -> tuple[Tensor, ...]:
        """See `Kind.examples`."""
        return tuple(slot.example(8, device) for slot in self.slots)

    def trial(self, tokens: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...] | None:
        """See `Kind.trial`; None if they would gather too many weights."""
        slots = self.slots
        stacked = [p for p in self.layers[0].parameters() if p.dim() == 3]
        experts = min((int(p.shape[0]) for p in stacked), default=1)
        chosen = next((int(s.sizes[-1] or 1) for s in slots if not s.dtype.is_floating_point), 1)
        each = sum(p.numel() * p.element_size() for p in stacked) / max(experts, 1)
        if tokens > 1 and tokens * chosen * each > _GATHERED:
            return None
        made = []
        for slot in slots:
            sizes = [1 if size is None else size for size in slot.sizes]
            varying = [dim for dim, size in enumerate(slot.sizes) if size is None]
            # Experts that take no routing are handed every expert's tokens in turn.
            sizes[varying[-1]] = tokens * experts if len(slots) == 1 and len(slot.sizes) == 2 else tokens
            if slot.dtype.is_floating_point:
                tensor = torch.rand(sizes, generator=generator)
                tensor = tensor / tensor.sum(-1, keepdim=True) if slot is slots[-1] and len(slots) > 1 else tensor - 0.5
            else:
                picks = [torch.randperm(experts, generator=generator)[: sizes[-1]] for _ in range(sizes[0])]
                tensor = torch.stack(picks)
            made.append(tensor.to(device, slot.dtype))
        return tuple(made)

    def check(self, captured: Captured) -> None:
        """See `Kind.check`. Nothing to refuse: an inside serves as many tokens as its trial found it right for."""

    def bind(self, made: Made, layer: nn.Module, tokens: int | None) -> Inside:
        """See `Kind.bind`."""
        return Inside(layer, made.run, made.order, len(self.slots), tokens)


def experts_kinds(layers: dict[str, dict[str, nn.Module]], slots: dict[str, Slots]) -> list[Kind]:
    """The kinds of opaque experts.

    Args:
        layers: qualified name -> layer, of each op.
        slots: what each op is called with.
    """
    return [
        ExpertsKind(op, *kind, slots[op])
        for op, named in layers.items()
        if len(slots[op]) in _BY_COUNT
        for kind in by_kind(named)
    ]


def by_kind(named: dict[str, nn.Module]) -> list[tuple[tuple[str, ...], tuple[nn.Module, ...], str]]:
    """Names and layers of each kind, and what it is told by. Layers with hooks are of none."""
    groups: dict[str, list[str]] = {}
    for name, described in zip(named, describe_layers(list(named.values())), strict=True):
        if not has_hooks(named[name]):
            groups.setdefault(described, []).append(name)
    return [(tuple(names), tuple(named[n] for n in names), described) for described, names in groups.items()]


def _inside_1(layer: Any, a0: Tensor) -> Tensor:
    return layer.forward(a0)


def _inside_3(layer: Any, a0: Tensor, a1: Tensor, a2: Tensor) -> Tensor:
    return layer.forward(a0, a1, a2)


_BY_COUNT: dict[int, Callable[..., Tensor]] = {1: _inside_1, 3: _inside_3}
