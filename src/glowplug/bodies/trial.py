"""Tries a body: it must be right, and it is used for as many tokens as it is faster for."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from glowplug.bodies.body import Body, BoundBody, Verdict
from glowplug.bodies.group import Group
from glowplug.bodies.make import SIZES
from glowplug.program.piece_store import Run
from glowplug.verify.slots import run_both

_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_RUNS = 7
_FASTER = 0.95
"""A body must take less than this share of the time of the layer's own code."""


def try_body(group: Group, body: Body, piece: Run, *, limited: bool) -> Verdict:
    """Try a body on a group's first layer with more and more tokens, until it is no longer faster than the layer's own
    code. If `limited`, the verdict always has a limit, even if the body is faster in all trials."""
    layer = group.layers[0]
    compiled = BoundBody(layer, piece, body, group.form).run
    own = functools.partial(group.own, layer)
    generator = torch.Generator().manual_seed(0)
    times: list[tuple[float, float]] = []
    tokens: int | None = 0
    with torch.no_grad():
        for sizes in SIZES:
            inputs = group.trial(group.sizes(**sizes), generator)
            if inputs is not None and run_both(own, compiled, inputs)[1] is not None:
                return Verdict()
        for count in _TOKENS:
            inputs = group.trial(group.sizes(count), generator)
            if inputs is None:
                break
            if run_both(own, compiled, inputs)[1] is not None:
                return Verdict()
            times.append((_microseconds(own, inputs), _microseconds(compiled, inputs)))
            if times[-1][1] > times[-1][0] * _FASTER:
                break
            tokens = count
    if not limited and tokens == _TOKENS[-1]:
        tokens = None
    return Verdict(tokens, *times[0])


def _microseconds(run: Callable[..., Any], inputs: Sequence[Tensor]) -> float:
    """Median time of a call."""
    finish = torch.cuda.synchronize if inputs[0].is_cuda else lambda: None
    run(*inputs)
    times = []
    for _ in range(_RUNS):
        finish()
        start = time.perf_counter()
        run(*inputs)
        finish()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6
