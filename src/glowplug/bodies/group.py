"""Groups of layers that share an op body."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from glowplug.bodies.form import CallForm
from glowplug.layers.stack import describe_layers

_CACHED = 128
"""The least number of cached tokens in a trial."""
_GATHERED = 2**28
"""The most bytes of weights that a trial may gather: on a CPU, compiled experts gather the weights of each token."""


@dataclass(frozen=True)
class Group:
    """Layers of equal structure whose op is called in the same way.

    Attributes:
        form: how the op is called.
        names: the layers' qualified names.
        layers: the layers.
        described: hash of everything that the layers' forward could read when the group was built, equal for all.
        own: `own(layer, *tensors)` computes the op by the layer's own code; this function is traced.
        traced: returns a stand-in for the first layer in the trace.
        address: hash of everything that the body depends on besides the compiler; None if that can't be described.
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
        """Whether a layer has changed since the group was built."""
        return any(described != self.described for described in describe_layers(self.layers))

    @property
    def device(self) -> torch.device:
        """The device of the first layer."""
        return next(self.layers[0].parameters()).device

    def sizes(self, tokens: int, batch: int = 1, kv_tokens: int | None = None) -> dict[str, int]:
        """The sizes of a call by name."""
        experts, _ = self._experts
        cached = max(tokens, _CACHED) if kv_tokens is None else kv_tokens
        # Experts that take no routing get the tokens of all experts at once, one expert after the other.
        routed = tokens * experts
        return {"batch": batch, "tokens": tokens, "kv_tokens": cached, "experts": experts, "routed_tokens": routed}

    def trial(self, sizes: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...] | None:
        """Random tensors for a call; None if the call would gather too many weights."""
        chosen = next((int(a.sizes[-1]) for a in self.form.arguments if a.content == "choices"), 1)
        gathered = sizes["batch"] * sizes["tokens"] * chosen * self._experts[1]
        if sizes["tokens"] > 1 and gathered > _GATHERED:
            return None
        return self.form.make(sizes, self.device, generator)

    @cached_property
    def _experts(self) -> tuple[int, float]:
        """The number of experts in a layer, and the bytes of one expert."""
        stacked = [p for p in self.layers[0].parameters() if p.dim() == 3]
        experts = min((int(p.shape[0]) for p in stacked), default=1)
        return experts, sum(p.numel() * p.element_size() for p in stacked) / experts
