"""Decides by a trial how many tokens a compiled inside is to serve: it must be right, and faster."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from glowplug.hf.kinds import Kind, Made
from glowplug.verify.slots import run_both

_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_RUNS = 7
_FASTER = 0.95
"""Share of the layer's own time that a compiled inside may take."""


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


def judge(kind: Kind, made: Made, *, limited: bool) -> Verdict:
    """Try a compiled inside on one layer, for more and more tokens, until it is no longer the faster way.

    Args:
        kind: the layers that it is for; the first is tried.
        made: the inside.
        limited: never let it serve any number of tokens.
    """
    layer = kind.layers[0]
    inside, own_code = kind.bind(made, layer, None), functools.partial(kind.function(), layer)
    generator = torch.Generator().manual_seed(0)
    times: list[tuple[float, float]] = []
    served: int | None = 0
    device = next(layer.parameters()).device
    with torch.no_grad():
        for others in kind.more_trials(generator, device):
            if run_both(own_code, inside.run, others)[1] is not None:
                return Verdict(0, math.nan, math.nan)
        for tokens in _TOKENS:
            inputs = kind.trial(tokens, generator, device)
            if inputs is None:
                break
            if run_both(own_code, inside.run, inputs)[1] is not None:
                return Verdict(0, math.nan, math.nan)
            own = _microseconds(functools.partial(own_code, *inputs), device)
            compiled = _microseconds(functools.partial(inside.run, *inputs), device)
            times.append((own, compiled))
            if compiled > own * _FASTER:
                break
            served = tokens
    if not times:
        return Verdict(0, math.nan, math.nan)
    if not limited and served == _TOKENS[-1]:
        served = None
    return Verdict(served, *times[0])


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
