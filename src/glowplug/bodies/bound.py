"""A body bound to one layer, and the bodies that a sequence runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from glowplug.bodies.form import CallForm
from glowplug.bodies.group import Group
from glowplug.layers.watch import ReadWatch
from glowplug.report import Report


class BoundBody:
    """A body, bound to one layer.

    Args:
        layer: the layer.
        piece: the compiled piece.
        arguments: its inputs, see `Body`. Weights are looked up at each call, so that a replaced one is never missed.
        form: of the calls that it serves.
        limit: elements of the op's first tensor that it serves at most; None: any number.
    """

    __slots__ = ("__weakref__", "_owner", "form", "limit", "run")

    def __init__(
        self,
        layer: nn.Module,
        piece: Callable[..., Sequence[Tensor]],
        arguments: Sequence[str],
        form: CallForm,
        limit: int | None = None,
    ) -> None:
        self._owner = weakref.ref(layer)
        self.form = form
        self.limit = limit
        names: dict[str, Any] = {"piece": piece}
        texts = []
        for number, text in enumerate(arguments):
            if text.startswith("@"):
                names[f"table_{number}"], leaf = _table(layer, text[1:])
                text = f"table_{number}[{leaf!r}]"
            texts.append(text)
        self.run: Callable[..., Tensor] = eval(f"lambda *tensors: piece({', '.join(texts)})[0]", names)

    def serves(self, layer: nn.Module, tensors: Sequence[Any], constants: str = "") -> bool:
        """Whether a call of the layer is to run it."""
        return (
            self._owner() is layer
            and (self.limit is None or tensors[0].numel() <= self.limit)
            and self.form.fits(tensors, constants)
        )


def _table(layer: nn.Module, path: str) -> tuple[Mapping[str, Any], str]:
    """The table of a module that holds a weight, and its name there."""
    parent, _, leaf = path.rpartition(".")
    module = layer.get_submodule(parent)
    tables: tuple[Mapping[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
    return next(table for table in tables if leaf in table), leaf


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
