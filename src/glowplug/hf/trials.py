"""Decides by a trial how many tokens a compiled inside is to serve: it must be right, and faster."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glowplug.ops.inside import Inside

_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_RUNS = 7
_FASTER = 0.95
"""Share of the layer's own time that a compiled inside may take."""
_GATHERED = 2**28
"""Bytes of gathered weights, at most: on a CPU the compiled inside gathers those of each token's experts."""
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest ||compiled - own|| / ||own|| of one layer. Half precision: 0.05."""


@dataclass(frozen=True)
class Verdict:
    """What a trial found.

    Attributes:
        tokens: serve up to so many; 0: none; None: any number.
        eager_us: microseconds of the layer's own forward, for one token.
        compiled_us: the same compiled.
    """

    tokens: int | None
    eager_us: float
    compiled_us: float


def judge(
    op: str, layer: nn.Module, slots: Sequence[Any], bind: Callable[[nn.Module, int | None], Inside], *, limited: bool
) -> Verdict:
    """Try a compiled inside on one layer, for more and more tokens, until it is no longer the faster way.

    Args:
        op: the op that the layer is called by.
        layer: the layer.
        slots: the op's tensors.
        bind: makes an inside for the layer.
        limited: never let it serve any number of tokens.
    """
    inside = bind(layer, None)
    generator = torch.Generator().manual_seed(0)
    times: list[tuple[float, float]] = []
    served: int | None = 0
    device = next(layer.parameters()).device
    with torch.no_grad():
        for tokens in _TOKENS:
            inputs = _inputs(layer, slots, tokens, generator, device)
            if inputs is None:
                break
            expected, actual = type(layer).forward(layer, *inputs), inside.run(*inputs)
            if not _close(actual, expected):
                return Verdict(0, math.nan, math.nan)
            own = _microseconds(lambda args=inputs: type(layer).forward(layer, *args), device)  # type: ignore[misc]
            compiled = _microseconds(lambda args=inputs: inside.run(*args), device)  # type: ignore[misc]
            times.append((own, compiled))
            if compiled > own * _FASTER:
                break
            served = tokens
    if not times:
        return Verdict(0, math.nan, math.nan)
    if not limited and served == _TOKENS[-1]:
        served = None
    return Verdict(served, *times[0])


def _inputs(
    layer: nn.Module, slots: Sequence[Any], tokens: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, ...] | None:
    """Random inputs of so many tokens; None if they would gather too many weights."""
    stacked = [p for p in layer.parameters() if p.dim() == 3]
    experts = min((int(p.shape[0]) for p in stacked), default=1)
    chosen = next((int(s.sizes[-1]) for s in slots if not s.dtype.is_floating_point), 1)
    each = sum(p.numel() * p.element_size() for p in stacked) / max(experts, 1)
    if tokens > 1 and tokens * chosen * each > _GATHERED:
        return None
    made = []
    for slot in slots:
        sizes = [1 if size is None else size for size in slot.sizes]
        varying = [dim for dim, size in enumerate(slot.sizes) if size is None]
        # Experts that take no routing are handed every expert's tokens in turn.
        sizes[varying[-1]] = tokens * experts if len(slots) == 1 and len(slot.sizes) == 2 else tokens
        if slot.dtype.is_floating_point:
            tensor = torch.rand(sizes, generator=generator)
            tensor = tensor / tensor.sum(-1, keepdim=True) if slot is slots[-1] and len(slots) > 1 else tensor - 0.5
        else:
            picks = [torch.randperm(experts, generator=generator)[: sizes[-1]] for _ in range(sizes[0])]
            tensor = torch.stack(picks)
        made.append(tensor.to(device, slot.dtype))
    return tuple(made)


def _close(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    error = float((actual - expected).float().norm() / expected.float().norm().clamp(min=1e-30))
    return error <= _TOLERANCE.get(expected.dtype, 0.05)


def _microseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median time of a call."""
    call()
    times = []
    for _ in range(_RUNS):
        _finish(device)
        start = time.perf_counter()
        call()
        _finish(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
