"""The registry of one model's layers: name -> layer object, the handle of each, and the order of creation."""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from torch import nn

from glowplug.errors import LayerLookupError, UsageError
from glowplug.layers.handle import LayerHandle

Identity = Literal["hoisted", "ordered", "baked"]

HANDLE_ATTR = "_glowplug_handle"
IDENTITY_ATTR = "_glowplug_identity"
NAME_ATTR = "_glowplug_name"
KIND_ATTR = "_glowplug_kind"
MARKS = frozenset({HANDLE_ATTR, IDENTITY_ATTR, NAME_ATTR, KIND_ATTR})
"""Attributes that registration sets on a layer. They say which layer it is and never what it computes."""

_scopes = itertools.count()
_live: weakref.WeakValueDictionary[int, LayerRegistry] = weakref.WeakValueDictionary()


class BakedName:
    """A layer's name as baked and ordered traces see it. In a copy of the model it names nothing until the copy is
    registered, as a handle does.

    Attributes:
        text: `"scope:qualified.name"`.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def __deepcopy__(self, memo: object) -> BakedName:
        return BakedName(f"copy:{self.text.partition(':')[2]}")

    def __reduce__(self) -> tuple[type[BakedName], tuple[str]]:
        return BakedName, (f"copy:{self.text.partition(':')[2]}",)


class LayerRegistry:
    """The layers of one model that layer ops may ask for.

    Args:
        layers: qualified name -> module, in the order of creation. Held weakly.
        identity: how traced calls say which layer they are: `"hoisted"`, `"ordered"` or `"baked"`.
    """

    def __init__(self, layers: Mapping[str, nn.Module], identity: Identity = "hoisted") -> None:
        self.scope = next(_scopes)
        self.identity = identity
        self.traced: dict[str, bool] = {}
        """Names of the layers that a capture of this model has seen, in the order of their calls."""
        self._layers: dict[str, weakref.ref[nn.Module]] = {}
        self._orders: dict[str, tuple[str, ...]] = {}
        self._kinds: dict[str, str] = {}
        self.handles: dict[str, LayerHandle] = {}
        for name, layer in layers.items():
            handle = LayerHandle(self.scope, name)
            handle.attach(layer)
            self.handles[name] = handle
            self._layers[name] = weakref.ref(layer)
            self._kinds[name] = _kind_token(layer)
            _mark(layer, handle, identity, BakedName(f"{self.scope}:{name}"), self._kinds[name])
        _live[self.scope] = self

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

    def kind(self, name: str) -> str:
        """A short token that is equal for layers of one class with weights of the same shapes."""
        return self._kinds[name]

    def set_order(self, op: str, names: Iterable[str]) -> None:
        """Say, once, in which order `identity="ordered"` hands out the layers of `op`."""
        self._orders[op] = tuple(names)

    def order(self, op: str) -> tuple[str, ...]:
        """The layers of `op` in the order of creation.

        Raises:
            UsageError: no order is known; the op's author must annotate its first parameter with the layer's class.
        """
        order = self._orders.get(op)
        if not order:
            raise UsageError(
                f'identity="ordered" needs to know which layers call {op}: annotate the first parameter of its '
                'function with the class of the layer, or use identity="hoisted".'
            )
        return order


def find_baked(name: str) -> nn.Module:
    """The layer that a baked name (`"scope:qualified.name"`) stands for, whatever model it belongs to."""
    return find_registry(name)[name.partition(":")[2]]


def find_registry(name: str) -> LayerRegistry:
    """The registry that made a baked name."""
    scope = name.partition(":")[0]
    registry = _live.get(int(scope)) if scope.isdigit() else None
    if registry is None:
        raise LayerLookupError(
            f"no live model has registered the layer {name.partition(':')[2]!r}: its model was copied, unpickled or "
            "deleted after it was registered. Call glowplug.register_layers(model) for the model that you run."
        )
    return registry


def register_layers(
    model: nn.Module, *, identity: Identity = "hoisted", layers: Mapping[str, nn.Module] | None = None
) -> LayerRegistry:
    """Give every module of `model` a handle, so that its layer ops can be traced.

    `glowplug.compile` does this by itself. Call it before `torch.compile(model, backend="glowplug")`, and keep the
    registry for as long as the model runs.

    Args:
        model: the model; its modules get a few private attributes, its weights and forward are left alone.
        identity: `"hoisted"` (a graph input, the default), `"ordered"` or `"baked"`.
        layers: qualified name -> module, to register only these.

    Returns:
        The registry. It holds the layers weakly.
    """
    if identity not in ("hoisted", "ordered", "baked"):
        raise UsageError(f"identity must be 'hoisted', 'ordered' or 'baked', not {identity!r}")
    chosen = dict(layers) if layers is not None else {name: m for name, m in model.named_modules() if name}
    return LayerRegistry(chosen, identity)


def _mark(layer: nn.Module, handle: LayerHandle, identity: str, name: BakedName, kind: str) -> None:
    for attr, value in ((HANDLE_ATTR, handle), (IDENTITY_ATTR, identity), (NAME_ATTR, name), (KIND_ATTR, kind)):
        object.__setattr__(layer, attr, value)


def _kind_token(layer: nn.Module) -> str:
    shapes = repr([(n, tuple(p.shape), str(p.dtype)) for n, p in layer.named_parameters()])
    return f"{type(layer).__name__}-{hashlib.sha256(shapes.encode()).hexdigest()[:8]}"
