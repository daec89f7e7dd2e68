"""The registry of one model's layers: name -> layer object, with a handle for each."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping
from typing import Literal

from torch import nn

from glowplug.errors import LayerLookupError, UsageError
from glowplug.layers.handle import LayerHandle
from glowplug.layers.other_identities import LayerName, Ordered
from glowplug.layers.reads import HANDLE_ATTR, OTHER_ATTR

Identity = Literal["hoisted", "ordered", "baked"]

_scopes = itertools.count()


class LayerRegistry(Ordered):
    """The layers of one model that layer ops can look up.

    Args:
        layers: qualified name -> module, in the order of creation. The references are weak.
        identity: how traced calls identify their layer: `"hoisted"`, `"ordered"` or `"baked"`.
    """

    def __init__(self, layers: Mapping[str, nn.Module], identity: Identity = "hoisted") -> None:
        self.scope = next(_scopes)
        self.identity = identity
        super().__init__(self.scope)
        self._layers = {name: weakref.ref(layer) for name, layer in layers.items()}
        self.handles = {name: LayerHandle(self.scope, name) for name in layers}
        for name, layer in layers.items():
            self.handles[name].attach(layer)
            other = None if identity == "hoisted" else LayerName(identity, f"{self.scope}:{name}", self.kind(name))
            object.__setattr__(layer, HANDLE_ATTR, self.handles[name])
            object.__setattr__(layer, OTHER_ATTR, other)

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __getitem__(self, name: str) -> nn.Module:
        ref = self._layers.get(name)
        layer = ref() if ref is not None else None
        if layer is None:
            raise LayerLookupError(f"no live layer {name!r} in this model; registered: {', '.join(self) or 'none'}")
        return layer


def register_layers(
    model: nn.Module, *, identity: Identity = "hoisted", layers: Mapping[str, nn.Module] | None = None
) -> LayerRegistry:
    """Give every module of `model` a handle, so that its layer ops can be traced.

    `glowplug.compile` does this itself. Call it before `torch.compile(model, backend="glowplug")`, and keep the
    registry as long as the model runs.

    Args:
        model: the model. Its modules get a few private attributes; its weights and forward don't change.
        identity: `"hoisted"` (a graph input, the default), `"ordered"` or `"baked"`.
        layers: qualified name -> module, to register only these.

    Returns:
        The registry. It holds the layers weakly.
    """
    if identity not in ("hoisted", "ordered", "baked"):
        raise UsageError(f"identity must be 'hoisted', 'ordered' or 'baked', not {identity!r}")
    chosen = dict(layers) if layers is not None else {name: m for name, m in model.named_modules() if name}
    return LayerRegistry(chosen, identity)
