"""Layers that one body serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from glowplug.bodies.form import CallForm
from glowplug.layers.stack import describe_layers

_CACHED = 128
"""Cached tokens of a trial, at least."""
_GATHERED = 2**28
"""Bytes of gathered weights in a trial, at most: on a CPU compiled experts gather those of each token."""


@dataclass(frozen=True)
class Group:
    """Layers of one structure whose op is called in one way.

    Attributes:
        form: how.
        names: their qualified names.
        layers: themselves.
        described: everything that their forward could read when the group was made, hashed: the same for all of them.
        own: what the op computes by the layer's own code, `own(layer, *tensors)`: a function to be traced.
        traced: what stands in for the first layer in the trace.
        address: what its body depends on besides the compiler, hashed; None when that can't be described.
    """

    form: CallForm
    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    described: str
    own: Callable[..., Tensor]
    traced: Callable[[], nn.Module]
    address: str | None = None

    @property
    def changed(self) -> bool:
        """Whether a layer is no longer what it was when the group was made."""
        return any(described != self.described for described in describe_layers(self.layers))

    @property
    def device(self) -> torch.device:
        """Where the first layer lies."""
        return next(self.layers[0].parameters()).device

    def sizes(self, tokens: int, batch: int = 1, kv_tokens: int | None = None) -> dict[str, int]:
        """Sizes of a call, by name."""
        experts, _ = self._experts
        cached = max(tokens, _CACHED) if kv_tokens is None else kv_tokens
        # Experts that take no routing are handed every expert's tokens in turn.
        routed = tokens * experts
        return {"batch": batch, "tokens": tokens, "kv_tokens": cached, "experts": experts, "routed_tokens": routed}

    def trial(self, sizes: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...] | None:
        """Random tensors of a call; None for one that would gather too many weights."""
        chosen = next((int(a.sizes[-1]) for a in self.form.arguments if a.content == "choices"), 1)
        gathered = sizes["batch"] * sizes["tokens"] * chosen * self._experts[1]
        if sizes["tokens"] > 1 and gathered > _GATHERED:
            return None
        return self.form.make(sizes, self.device, generator)

    @cached_property
    def _experts(self) -> tuple[int, float]:
        """How many experts a layer has, and the bytes of one."""
        stacked = [p for p in self.layers[0].parameters() if p.dim() == 3]
        experts = min((int(p.shape[0]) for p in stacked), default=1)
        return experts, sum(p.numel() * p.element_size() for p in stacked) / experts
