"""Decides by a trial how many tokens a body is to serve: it must be right, and faster."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from glowplug.bodies.body import Body, BoundBody, Piece, Verdict
from glowplug.bodies.group import Group
from glowplug.bodies.make import SIZES
from glowplug.verify.slots import run_both

_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_RUNS = 7
_FASTER = 0.95
"""Share of the layer's own time that a body may take."""


def try_body(group: Group, body: Body, piece: Piece, *, limited: bool) -> Verdict:
    """Try a body on a group's first layer, for more and more tokens, until it is no longer the faster way.

    Args:
        group: the layers that it is for.
        body: the body.
        piece: its compiled piece.
        limited: never let it serve any number of tokens.
    """
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
