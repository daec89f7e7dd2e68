"""Layers of experts that one compiled inside serves, and what such an inside is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Slot:
    """One tensor that an op is called with: its sizes (None for one that varies), and its dtype."""

    sizes: tuple[int | None, ...]
    dtype: torch.dtype

    def example(self, tokens: int, device: torch.device) -> Tensor:
        """A tensor of zeros of that form; the last of the sizes that vary is the number of tokens, others are 2."""
        varying = [dim for dim, size in enumerate(self.sizes) if size is None]
        sizes = [2 if size is None else size for size in self.sizes]
        if varying:
            sizes[varying[-1]] = tokens
        tensor = torch.zeros(sizes, dtype=self.dtype, device=device)
        for dim in varying:
            torch._dynamo.mark_dynamic(tensor, dim)
        return tensor


Slots = tuple[Slot, ...]


@dataclass(frozen=True)
class Kind:
    """Layers that one compiled inside serves.

    Attributes:
        op: the op that they are called by.
        names: their qualified names.
        layers: themselves.
        slots: what the op is called with.
    """

    op: str
    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    slots: Slots


@dataclass(frozen=True)
class Made:
    """A compiled inside, unbound.

    Attributes:
        run: the callable; None where it is not loaded.
        order: see `Inside`.
        seconds: what it took.
        artifact: its form on disk, where there is one.
    """

    run: Any
    order: tuple[str, ...]
    seconds: float
    artifact: bytes | None = None
