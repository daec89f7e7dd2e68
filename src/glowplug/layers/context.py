"""`ForwardContext`: the state of one forward pass that must not enter a graph: its cache and its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from glowplug.layers.other_identities import Turns
from glowplug.layers.registry import LayerRegistry


@dataclass(slots=True)
class ForwardContext(Turns):
    """State of one forward pass of one model, alive from its first op to its last.

    Args:
        registry: the layers of the running model.
        cache: the key-value cache that `glowplug::kv_cache_update` writes to (any object with
            `update(keys, values, layer_idx)`). If None, keys and values pass through.
        check_order: whether a wrong order raises, with `identity="ordered"`. Only a demonstration turns it off.
        bodies: id of a layer -> the compiled body that its op runs in this pass; see `glowplug.bodies`.
        attend: runs attention instead of the layers' own functions where it returns a tensor:
            `attend(layer, query, key, value, mask, options)`.

    Attributes:
        derived: id of a tensor of this pass, and a dtype -> the tensor, and what was computed of it for all layers.
    """

    registry: LayerRegistry
    cache: Any = None
    check_order: bool = True
    bodies: Mapping[int, Any] = field(default_factory=dict)
    attend: Callable[..., Tensor | None] | None = None
    derived: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _counters: dict[str, int] = field(default_factory=dict)


_current: ContextVar[ForwardContext | None] = ContextVar("glowplug_forward_context", default=None)


def current_context() -> ForwardContext | None:
    """The innermost `ForwardContext` of this thread or task; None if there is none."""
    return _current.get()


def body_for(layer: nn.Module, tensors: Sequence[Any], constants: str = "") -> Callable[..., Tensor] | None:
    """The compiled body that a layer's op runs in this pass for these tensors; None to run the layer's own code."""
    context = _current.get()
    body = context.bodies.get(id(layer)) if context is not None else None
    return body.run if body is not None and body.serves(layer, tensors, constants) else None


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[ForwardContext]:
    """Make `context` current for one forward pass. Contexts nest; threads and tasks don't see each other's.

    Raises:
        LayerOrderError: on a clean exit, if `identity="ordered"` has layers left over; no output was returned yet.
    """
    token = _current.set(context)
    try:
        yield context
        context.finish()
    finally:
        _current.reset(token)
