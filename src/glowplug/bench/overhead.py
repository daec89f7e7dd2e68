"""What a program costs besides its pieces and ops: its own lines, and the work around it in each call."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from glowplug.engine import engine_of

_RUNS = 50
OVERHEAD_STEPS = _RUNS + 2
"""Decode steps that a measurement takes."""


def overhead_us(model: PreTrainedModel, step: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of a decode step that are not spent in pieces and ops.

    Runs the program with every piece and op replaced by a function that immediately returns what the real one returned.

    Args:
        model: a compiled model.
        step: runs one decode step of it.

    Returns:
        `"step"`: the program, divided by its pieces and ops; `"call"`: a whole call of the model. Empty if the model
        runs eager or has several programs.
    """
    engine = engine_of(model)
    programs = engine.compilation.programs if engine is not None else []
    if len(programs) != 1:
        return {}
    program = programs[0].program
    ops = {name: v for name, v in program.names.items() if callable(v) and not isinstance(v, nn.Module)}
    results: list[Any] = []

    def record(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            results.append(run(*args))
            return results[-1]

        return call

    def replay(*args: Any) -> Any:
        return next(recorded)

    def replacing(replace: Callable[[Any], Any]) -> Callable[..., Any]:
        """The program's `run`, with its pieces and ops replaced."""
        names = {**program.names, **{name: replace(op) for name, op in ops.items()}}
        exec(program.source, names)
        return functools.partial(names["run"], tuple(map(replace, program.slots.values())))

    calls, times = [], []
    try:
        object.__setattr__(program, "run", replacing(record))
        step()
        recorded = itertools.cycle(results)
        run = replacing(lambda _: replay)

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            output = run(*args)
            times.append(time.perf_counter() - start)
            return output

        object.__setattr__(program, "run", timed)
        for _ in range(_RUNS):
            start = time.perf_counter()
            step()
            calls.append(time.perf_counter() - start)
    finally:
        object.__delattr__(program, "run")  # the cached property is computed again
    return {
        "step": round(statistics.median(times) * 1e6 / len(results), 2),
        "call": round(statistics.median(calls) * 1e6, 1),
    }
