"""The identities that preceded handles: `"baked"` puts a layer's name in the graph, and `"ordered"` relies on the order
in which layers were created, like vLLM's pull request 32805. You need neither to understand hoisted handles.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from glowplug.errors import LayerLookupError, LayerOrderError, UsageError

if TYPE_CHECKING:
    from glowplug.layers.context import ForwardContext
    from glowplug.layers.registry import LayerRegistry

_ADVICE = (
    'The output was withheld. identity="ordered" (fast_moe_cold_start=True) needs every layer to run once, in the '
    'order of creation; use identity="hoisted" (fast_moe_cold_start=None), which assumes no order.'
)

_live: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_traced_calls: dict[str, list[str]] = {}


class LayerName:
    """The mark on a layer. In a copy of the model it names no layer until the copy is registered.

    Attributes:
        identity: `"baked"` or `"ordered"`.
        text: `"scope:qualified.name"`.
        kind: see `Ordered.kind`.
    """

    def __init__(self, identity: str, text: str, kind: str) -> None:
        self.identity = identity
        self.text = text
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerName, (self.identity, f"copy:{self.text.partition(':')[2]}", self.kind)


class Ordered:
    """The part of a registry that these identities need; `scope` is the registry's number."""

    def __init__(self, scope: int) -> None:
        self._kinds: dict[str, str] = {}
        self._orders: dict[str, tuple[str, ...]] = {}
        _live[scope] = self

    if TYPE_CHECKING:

        def __getitem__(self, name: str) -> nn.Module: ...

    def kind(self, name: str) -> str:
        """A short token, equal for layers of one class with weights of the same shapes."""
        if name not in self._kinds:
            layer: nn.Module = self[name]
            shapes = repr([(n, tuple(p.shape), str(p.dtype)) for n, p in layer.named_parameters()])
            self._kinds[name] = f"{type(layer).__name__}-{hashlib.sha256(shapes.encode()).hexdigest()[:8]}"
        return self._kinds[name]

    def set_order(self, op: str, names: Iterable[str]) -> None:
        """Set the order in which `identity="ordered"` hands out the layers of `op`."""
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


class Turns:
    """The part of a forward pass that `"ordered"` needs: whose turn it is."""

    __slots__ = ()
    registry: LayerRegistry
    check_order: bool
    _counters: dict[str, int]

    def next_layer(self, op: str, kind: str) -> nn.Module:
        """The layer whose turn it is for `op`.

        Args:
            op: the op's qualified name, such as `"glowplug::moe_forward"`.
            kind: the kind of the layer that the call was traced for.

        Raises:
            LayerOrderError: every layer has had its turn, or the next one is of another kind.
        """
        order = self.registry.order(op)
        index = self._counters.get(op, 0)
        self._counters[op] = index + 1
        if not self.check_order:
            return self.registry[order[index % len(order)]]
        if index >= len(order):
            raise LayerOrderError(
                f"{op} was called {index + 1} times in one forward pass, but {len(order)} layers are registered for "
                f"it: a layer ran twice. {_ADVICE}"
            )
        next_kind = self.registry.kind(order[index])
        if next_kind != kind:
            raise LayerOrderError(
                f"call {index + 1} of {op} came from a layer of kind {kind!r}, but next in order is {order[index]!r} "
                f"of kind {next_kind!r}, which did not run. {_ADVICE}"
            )
        return self.registry[order[index]]

    def finish(self) -> None:
        """Check after the pass, before its output is used, that every layer had its turn.

        Raises:
            LayerOrderError: an op that ran in this pass has layers left over.
        """
        for op, used in self._counters.items() if self.check_order else ():
            order = self.registry.order(op)
            missing = order[used:]
            if missing:
                shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
                raise LayerOrderError(
                    f"{op} ran {used} times in one forward pass, but {len(order)} layers are registered for it, so "
                    f"calls may have reached the wrong layers' weights: {len(missing)} layers did not run ({shown}). "
                    f"{_ADVICE}"
                )


def find_baked(text: str) -> nn.Module:
    """The layer that a baked name (`"scope:qualified.name"`) stands for, whatever model it belongs to."""
    layer: nn.Module = _registry(text)[text.partition(":")[2]]
    return layer


def find_ordered(context: ForwardContext | None, op: str, kind: str) -> nn.Module:
    """The layer whose turn it is in the current forward pass."""
    if context is None:
        raise LayerLookupError(
            f'{op} with identity="ordered" ran outside a ForwardContext. Run the model through '
            "glowplug.compile(model), or inside glowplug.forward_context(ForwardContext(registry))."
        )
    return context.next_layer(op, kind)


@torch.compiler.assume_constant_result
def note_call(op: str, text: str, kind: str) -> str:
    """Note which layer makes an ordered call. Runs during the trace and never in a graph."""
    _traced_calls.setdefault(op, []).append(text)
    return kind


def check_calls(op: str, calls: int) -> None:
    """Compare the order of the layers' calls in a trace with the order in which `"ordered"` will hand them out.

    Raises:
        LayerOrderError: the graph calls the op once for each registered layer, but in another order. (Too many or too
            few calls raise when the graph runs, before its output is used.)
    """
    traced = _traced_calls.pop(op, [])[-calls:]
    if not traced:
        return
    registry = _registry(traced[0])
    pairs = zip(traced, (f"{registry.scope}:{name}" for name in registry.order(op)), strict=False)
    wrong = next(((index, *pair) for index, pair in enumerate(pairs, 1) if pair[0] != pair[1]), None)
    if wrong is not None and calls == len(registry.order(op)):
        raise LayerOrderError(
            f"call {wrong[0]} of {op} is made by {wrong[1].partition(':')[2]!r}, but {wrong[2].partition(':')[2]!r} "
            f"was created in its place. {_ADVICE}"
        )


def _registry(text: str) -> Any:
    scope, _, name = text.partition(":")
    registry = _live.get(int(scope)) if scope.isdigit() else None
    if registry is None:
        raise LayerLookupError(
            f"no live model has registered the layer {name!r}: its model was copied, unpickled or deleted after it was "
            "registered. Call glowplug.register_layers(model) for the model that you run."
        )
    return registry
