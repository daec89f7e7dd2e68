"""How far a result is from what it should be."""

from __future__ import annotations

from torch import Tensor


def distance(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, of floating point tensors of one shape; NaN when a value is."""
    return float((actual - expected).float().norm() / expected.float().norm().clamp(min=1e-30))
