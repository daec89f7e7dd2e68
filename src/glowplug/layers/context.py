"""`ForwardContext`: what one forward pass knows and no graph may: its cache, and the order of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from glowplug.errors import LayerOrderError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from glowplug.layers.registry import LayerRegistry


@dataclass(slots=True)
class ForwardContext:
    """State of one forward pass of one model, alive from its first op to its last.

    Args:
        registry: the layers of the model that runs.
        cache: the key-value cache that `glowplug::kv_cache_update` writes to (any object with
            `update(keys, values, layer_idx)`), or None: keys and values pass through.
        check_order: with `identity="ordered"`, whether a wrong order raises. Only a demonstration turns it off.
        bodies: id of a layer -> the compiled body that its op runs in this pass; see `glowplug.bodies`.
    """

    registry: LayerRegistry
    cache: Any = None
    check_order: bool = True
    bodies: Mapping[int, Any] = field(default_factory=dict)
    _counters: dict[str, int] = field(default_factory=dict)

    def next_layer(self, op: str, kind: str) -> nn.Module:
        """The layer whose turn it is for `op` (`identity="ordered"`).

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
                f"it: a layer ran twice. {ORDER_ADVICE}"
            )
        layer = self.registry[order[index]]
        if self.registry.kind(order[index]) != kind:
            raise LayerOrderError(
                f"call {index + 1} of {op} came from a layer of kind {kind!r}, but next in order is {order[index]!r} "
                f"of kind {self.registry.kind(order[index])!r}, which did not run. {ORDER_ADVICE}"
            )
        return layer

    def finish(self) -> None:
        """Check, once the pass is over and before its output is used, that every layer had its turn.

        Raises:
            LayerOrderError: an op that ran in this pass has layers left over.
        """
        if not self.check_order:
            return
        for op, used in self._counters.items():
            order = self.registry.order(op)
            if used != len(order):
                raise LayerOrderError(
                    f"{op} ran {used} times in one forward pass, but {len(order)} layers are registered for it, so "
                    f"calls may have reached the wrong layers' weights: {_not_run(self.registry, order, used)} "
                    f"{ORDER_ADVICE}"
                )


ORDER_ADVICE = (
    'The output was withheld. identity="ordered" (fast_moe_cold_start=True) needs every layer to run once, in the '
    'order of creation; use identity="hoisted" (fast_moe_cold_start=None), which assumes no order.'
)


def _not_run(registry: LayerRegistry, order: tuple[str, ...], used: int) -> str:
    """Name the layers that can't have run: those the trace never saw, or, without a trace, those left over."""
    seen: Mapping[str, bool] = registry.traced
    missing = [name for name in order if seen and name not in seen] or list(order[used:])
    shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
    return f"{len(missing)} layers did not run ({shown})."


_current: ContextVar[ForwardContext | None] = ContextVar("glowplug_forward_context", default=None)


def current_context() -> ForwardContext | None:
    """The innermost `ForwardContext` of this thread or task, or None outside any."""
    return _current.get()


def body_for(layer: nn.Module, tensors: Sequence[Any], constants: str = "") -> Callable[..., Tensor] | None:
    """The compiled body that a layer's op runs in this pass for these tensors; None: the layer's own code."""
    context = _current.get()
    body = context.bodies.get(id(layer)) if context is not None else None
    return body.run if body is not None and body.serves(layer, tensors, constants) else None


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[ForwardContext]:
    """Make `context` current for one forward pass. Contexts nest, and threads and tasks don't see each other's.

    Raises:
        LayerOrderError: on a clean exit, when `identity="ordered"` left layers over; nothing was returned yet.
    """
    token = _current.set(context)
    try:
        yield context
        context.finish()
    finally:
        _current.reset(token)
