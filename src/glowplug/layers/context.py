"""`ForwardContext`: what one forward pass knows and no graph may: its cache, and its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from glowplug.layers.other_identities import Turns
from glowplug.layers.registry import LayerRegistry


@dataclass(slots=True)
class ForwardContext(Turns):
    """State of one forward pass of one model, alive from its first op to its last.

    Args:
        registry: the layers of the model that runs.
        cache: the key-value cache that `glowplug::kv_cache_update` writes to (any object with
            `update(keys, values, layer_idx)`), or None: keys and values pass through.
        check_order: with `identity="ordered"`, whether a wrong order raises. Only a demonstration turns it off.
        insides: id of a layer -> the compiled body that its op runs in this pass; see `glowplug.ops.inside`.
    """

    registry: LayerRegistry
    cache: Any = None
    check_order: bool = True
    insides: Mapping[int, Any] = field(default_factory=dict)
    _counters: dict[str, int] = field(default_factory=dict)


_current: ContextVar[ForwardContext | None] = ContextVar("glowplug_forward_context", default=None)


def current_context() -> ForwardContext | None:
    """The innermost `ForwardContext` of this thread or task, or None outside any."""
    return _current.get()


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
