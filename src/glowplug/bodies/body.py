"""A body: the compiled inside of an op, unbound, and bound to one layer."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from glowplug.bodies.form import CallForm
from glowplug.bodies.group import Group
from glowplug.layers.watch import ReadWatch
from glowplug.report import Report

Piece = Callable[..., Sequence[Tensor]]


class Verdict(NamedTuple):
    """What a trial found: up to how many tokens a body is to serve (None: any number), and the microseconds of the
    layer's own code and of the body, for one token."""

    tokens: int | None = 0
    eager_us: float = math.nan
    compiled_us: float = math.nan


@dataclass(frozen=True)
class Body:
    """A body, bound to no layer.

    Attributes:
        arguments: for each input of the compiled piece an expression over the op's `tensors`, or `"@"` and the path of
            a weight in the layer.
        relations: of sizes that it relies on, see `CallForm.check`.
        seconds: what making it took.
        reads: sources of what its trace read, of the layer (`L['layer']...`) and of globals.
        globals: the plain values that it read of Python modules, as text.
        artifact: the compiled piece; empty where that has no form on disk.
        verdict: what a trial found; None when nobody has tried it.
    """

    arguments: tuple[str, ...]
    relations: tuple[str, ...] = ()
    seconds: float = 0.0
    reads: tuple[str, ...] = ()
    globals: Mapping[str, str] = field(default_factory=dict)
    artifact: bytes = b""
    verdict: Verdict | None = None


class BoundBody:
    """A body, bound to one layer.

    Args:
        layer: the layer.
        piece: the compiled piece.
        body: the body. Weights are looked up at each call, so that a replaced one is never missed.
        form: of the calls that it serves.
        limit: elements of the op's first tensor that it serves at most; None: any number.
    """

    __slots__ = ("__weakref__", "_fits", "_owner", "form", "limit", "run")

    def __init__(self, layer: nn.Module, piece: Piece, body: Body, form: CallForm, limit: int | None = None) -> None:
        self._owner = weakref.ref(layer)
        self.form = form
        self._fits = form.check(body.relations)
        self.limit = limit
        names: dict[str, Any] = {"piece": piece}
        texts = []
        for number, text in enumerate(body.arguments):
            if text.startswith("@"):
                names[f"table_{number}"], leaf = _table(layer, text[1:])
                text = f"table_{number}[{leaf!r}]"
            texts.append(text)
        self.run: Callable[..., Tensor] = eval(f"lambda *tensors: piece({', '.join(texts)})[0]", names)

    def serves(self, layer: nn.Module, tensors: Sequence[Any], constants: str = "") -> bool:
        """Whether a call of the layer is to run it."""
        form = self.form
        return (
            self._owner() is layer
            and constants == form.constants
            and len(tensors) == len(form.arguments)
            and self._fits(*tensors)
            and (self.limit is None or tensors[0].numel() <= self.limit)
        )


def _table(layer: nn.Module, path: str) -> tuple[Mapping[str, Any], str]:
    """The table of a module that holds a weight, and its name there."""
    parent, _, leaf = path.rpartition(".")
    module = layer.get_submodule(parent)
    return (module._parameters if leaf in module._parameters else module._buffers), leaf


@dataclass(frozen=True)
class InUse:
    """The bodies that a sequence runs.

    Attributes:
        groups: each group that has one, with what finds changes of what the body's trace read.
        every: id of a layer -> its body.
    """

    groups: tuple[tuple[Group, ReadWatch], ...] = ()
    every: Mapping[int, BoundBody] = field(default_factory=dict)

    def unchanged(self, report: Report) -> Mapping[int, BoundBody]:
        """Those of groups whose layers still are what the body was made from."""
        changes = [(group, change) for group, watch in self.groups if (change := watch.change()) is not None]
        if not changes:
            return self.every
        for group, change in changes:
            what = f"the compiled body of {group.form.op} is not used, as {change} after it was compiled"
            report.fall_back(what, group.names, to="op")
        changed = {id(layer) for group, _ in changes for layer in group.layers}
        return {key: body for key, body in self.every.items() if key not in changed}
