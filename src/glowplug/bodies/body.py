"""An op body, unbound or bound to one layer, and the bodies in use."""

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
from glowplug.program.piece_store import Run
from glowplug.report import Report


class Verdict(NamedTuple):
    """The result of a trial: the largest number of tokens to use a body for (None: no limit), and the microseconds that
    the layer's own code and the body take for one token."""

    tokens: int | None = 0
    eager_us: float = math.nan
    compiled_us: float = math.nan


@dataclass(frozen=True)
class Body:
    """A body that is not bound to a layer.

    Attributes:
        arguments: for each input of the compiled piece an expression over the op's `tensors`, or `"@"` and the path of
            a weight in the layer.
        relations: relations between sizes that it relies on, see `CallForm.check`.
        seconds: how long tracing and compiling took.
        reads: sources of everything that its trace read, in the layer (`L['layer']...`) and in globals.
        globals: the plain values that the trace read from Python modules, as text.
        artifact: the stored form of the compiled piece; empty if there is none.
        verdict: the result of its trial; None if it was not tried yet.
    """

    arguments: tuple[str, ...]
    relations: tuple[str, ...] = ()
    seconds: float = 0.0
    reads: tuple[str, ...] = ()
    globals: Mapping[str, str] = field(default_factory=dict)
    artifact: bytes = b""
    verdict: Verdict | None = None


class BoundBody:
    """A body bound to one layer. It looks up weights at each call, so that it sees replaced weights.

    Args:
        layer: the layer.
        piece: the compiled piece.
        body: the body.
        form: the form of the calls that it serves.
        limit: the largest number of elements of the op's first tensor; None: no limit.
    """

    __slots__ = ("__weakref__", "_fits", "_owner", "form", "limit", "run")

    def __init__(self, layer: nn.Module, piece: Run, body: Body, form: CallForm, limit: int | None = None) -> None:
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
        """Whether a call of the layer can run this body."""
        form = self.form
        return (
            self._owner() is layer
            and constants == form.constants
            and len(tensors) == len(form.arguments)
            and self._fits(*tensors)
            and (self.limit is None or tensors[0].numel() <= self.limit)
        )


def _table(layer: nn.Module, path: str) -> tuple[Mapping[str, Any], str]:
    """The parameter or buffer table that holds a weight, and the weight's name there."""
    parent, _, leaf = path.rpartition(".")
    module = layer.get_submodule(parent)
    return (module._parameters if leaf in module._parameters else module._buffers), leaf


@dataclass(frozen=True)
class InUse:
    """The bodies that a sequence runs.

    Attributes:
        groups: each group that has a body, and the watch on everything that the body's trace read.
        every: id of each layer -> its body.
    """

    groups: tuple[tuple[Group, ReadWatch], ...] = ()
    every: Mapping[int, BoundBody] = field(default_factory=dict)

    def unchanged(self, report: Report) -> Mapping[int, BoundBody]:
        """The bodies whose layers have not changed since the body was compiled."""
        changes = [(group, change) for group, watch in self.groups if (change := watch.change()) is not None]
        if not changes:
            return self.every
        for group, change in changes:
            what = f"the compiled body of {group.form.op} is not used, as {change} after it was compiled"
            report.fall_back(what, group.names, to="op")
        changed = {id(layer) for group, _ in changes for layer in group.layers}
        return {key: body for key, body in self.every.items() if key not in changed}
