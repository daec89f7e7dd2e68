"""Decode steps over transformers' caches, as CUDA graphs need them: how a static cache writes one token, without a
Python value that changes. Checked on transformers 5.17 and 5.23.

A `StaticLayer` counts its tokens in a tensor. A `StaticSlidingWindowLayer` counts them in an int, too: until its window
is full, it writes as a `StaticLayer` does; from then on it moves all tokens by one place, in a way that copies an index
from the host and so can't be recorded.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from glowplug.frontends.hf.calls import HfCall
from glowplug.verify.closeness import EXACT, difference


class _RecordableCache(StaticCache):
    """A view of a static cache that writes one token by tensor operations alone; it shares all that the cache has."""

    @classmethod
    def of(cls, cache: StaticCache) -> _RecordableCache:
        """The view of a cache."""
        view = object.__new__(cls)
        view.__dict__ = cache.__dict__
        return view

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `Cache.update`."""
        layer = self.layers[layer_idx]
        if not _is_full(layer):
            keys, values = (_append if append_is_right() else StaticLayer.update)(layer, key_states, value_states)
            return keys, values
        for held, new in ((layer.keys, key_states), (layer.values, value_states)):
            held.copy_(torch.cat((held[:, :, 1:], new), dim=-2))
        return layer.keys, layer.values


def _append(layer: Any, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
    """What `StaticLayer.update` does with one token, in three launches instead of five."""
    position = layer.cumulative_length.view(1)
    layer.keys.index_copy_(2, position, key_states)
    layer.values.index_copy_(2, position, value_states)
    layer.cumulative_length.add_(1)
    return layer.keys, layer.values


@functools.cache
def append_is_right() -> bool:
    """Whether this transformers' `StaticLayer.update` has the same effect as `_append`. Found out once, before a step
    is recorded."""
    with contextlib.suppress(Exception), torch.inference_mode(False), torch.device("cpu"):
        layers = [StaticLayer(max_cache_len=3) for _ in range(2)]
        for layer in layers:
            layer.update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 2))
        tokens = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 2), 3.0)
        results = [StaticLayer.update(layers[0], *tokens), _append(layers[1], *tokens)]
        states = [vars(layer) | {"returned": result} for layer, result in zip(layers, results, strict=True)]
        return difference(states[1], states[0], EXACT, "the layer") is None
    return False


@dataclass(frozen=True)
class StaticStep:
    """One token for each sequence of a static cache; see `glowplug.cuda_graphs.FixedStep`.

    Attributes:
        cache: the cache.
    """

    cache: StaticCache
    grows: ClassVar[Literal[False]] = False

    @property
    def phase(self) -> tuple[bool, ...]:
        """Which layers have a full window."""
        return tuple(map(_is_full, self.cache.layers))

    @property
    def tensors(self) -> Sequence[Tensor]:
        """See `FixedStep.tensors`."""
        return [t for layer in self.cache.layers for t in (layer.keys, layer.values, layer.cumulative_length)]

    def rebind(self, tensors: Sequence[Tensor]) -> None:
        """See `FixedStep.rebind`."""
        for layer, own in zip(self.cache.layers, zip(*[iter(tensors)] * 3, strict=True), strict=True):
            layer.keys, layer.values, layer.cumulative_length = own

    def recordable(self) -> StaticCache:
        """See `FixedStep.recordable`."""
        return _RecordableCache.of(self.cache)

    def advance(self) -> None:
        """See `FixedStep.advance`."""
        for layer in self.cache.layers:
            if type(layer) is StaticSlidingWindowLayer:
                layer.cumulative_length_int += 1


@dataclass(frozen=True)
class GrowingStep:
    """One token for each sequence of a growing cache; see `glowplug.cuda_graphs.GrowingStep`. Its layers copy what they
    are given.

    Attributes:
        cache: the cache.
        sizes: those of the step's input.
    """

    cache: Cache
    sizes: tuple[int, ...]
    grows: ClassVar[Literal[True]] = True


_LAYERS: dict[type[Cache], set[type]] = {
    StaticCache: {StaticLayer, StaticSlidingWindowLayer},
    DynamicCache: {DynamicLayer, DynamicSlidingWindowLayer},
}


def decode_step(call: HfCall) -> StaticStep | GrowingStep | None:
    """The step that a call makes; None if it is none of one token over a cache of classes known here."""
    cache: Any = call.cache
    if type(cache) not in _LAYERS or call.inputs.shape[1] != 1 or getattr(cache, "offloading", False):
        return None
    classes = _LAYERS[type(cache)]
    if not cache.layers or any(type(layer) not in classes or not layer.is_initialized for layer in cache.layers):
        return None
    if type(cache) is not StaticCache:
        return GrowingStep(cache, tuple(call.inputs.shape))
    append_is_right()
    return StaticStep(cache)


def _is_full(layer: Any) -> bool:
    return type(layer) is StaticSlidingWindowLayer and layer.cumulative_length_int >= layer.max_cache_len
