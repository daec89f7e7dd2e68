"""Measures one strategy on one model, in this process: cold start, error against eager, steady state, memory."""

from __future__ import annotations

import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

import glowplug
from glowplug.bench import gpu
from glowplug.bench.models import load_model
from glowplug.bench.overhead import OVERHEAD_STEPS, overhead_us
from glowplug.bench.results.record import Record, empty_record
from glowplug.bench.spec import Spec
from glowplug.bench.stepping import WARM_UP, Sequence, Text, relative_error, times_s, two_tokens
from glowplug.bench.strategies import Strategy, get_strategy, hit_recompile_limit
from glowplug.bench.workers.turns import my_turns

PREFILL = 128
"""Tokens of the prompt of the steady-state prefill."""
STEPS = 40
"""The largest number of decode steps in the steady state."""
_STEPS_A_TURN = 8


def measure(spec: Spec, keep: Callable[[Record], None] = lambda record: None) -> Record:
    """Measure one strategy in this process; raises whatever the strategy raises.

    Args:
        spec: what to measure.
        keep: is called with the record so far after the cold start and, on a GPU, after each of its figures.
    """
    strategy, on_gpu = get_strategy(spec.strategy), spec.device == "cuda"
    record = empty_record(spec)
    model = load_model(spec.model, depth=spec.depth, width=spec.width, device=spec.device, dtype=spec.dtype)
    text = Text.make(model, max(PREFILL, spec.prefill + WARM_UP + STEPS + 1, spec.prefill + OVERHEAD_STEPS))

    def observe(record: Record) -> None:
        record["fallback"] = _fallbacks(strategy, model)
        record["peak_rss_mb"] = _peak_rss_mb()
        if on_gpu:
            record["cuda_peak_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        keep(record)

    with torch.no_grad():
        if on_gpu:
            expected = gpu.start(model, strategy, spec, record)
        else:
            _start(model, strategy, spec, text, record)
        if strategy.compiles_by == "glowplug":
            _add_report(record, model)
        observe(record)
        glowplug.settle(model)
        if on_gpu:
            gpu.add_figures(model, strategy, spec, record, expected, observe)
        elif strategy.compiles_by == "glowplug":
            sequence = Sequence(model, text)
            sequence.step(spec.prefill)
            record["overhead_us"] = overhead_us(model, lambda: sequence.step(1))
        if not strategy.auto_compile:  # it compiles nothing outside of `generate`
            record["steady_ms"] = _steady_ms(model, text, spec)
    observe(record)
    return record


def _start(model: PreTrainedModel, strategy: Strategy, spec: Spec, text: Text, record: Record) -> None:
    """Compile a model and read two tokens; fills in `cold_start_s` and `max_rel_err`."""
    expected, _ = two_tokens(model, text, spec.prefill)
    begin = time.perf_counter()
    strategy.apply(model, spec)
    actual, _ = two_tokens(model, text, spec.prefill)
    record["cold_start_s"] = round(time.perf_counter() - begin, 4)
    record["max_rel_err"] = max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))


def _steady_ms(model: PreTrainedModel, text: Text, spec: Spec) -> dict[str, float]:
    """Median ms of a decode step and of a prefill, measured at once or in turns with other strategies' processes."""
    turns = my_turns()
    decode: list[float] = []
    prefill: list[float] = []
    for _ in [None] if turns is None else turns:
        steps, cap_s = (STEPS, spec.steady_s) if turns is None else (_STEPS_A_TURN, spec.steady_s / 10)
        sequence = Sequence(model, text)
        sequence.step(spec.prefill)
        decode += times_s(functools.partial(sequence.step, 1), model.device, steps, cap_s)
        prefill += times_s(lambda: Sequence(model, text).step(PREFILL), model.device, steps, cap_s)
    measured = {"decode": decode, "prefill128": prefill}
    return {name: round(statistics.median(times) * 1000, 4) for name, times in measured.items() if times}


def _add_report(record: Record, model: PreTrainedModel) -> None:
    """Copy what glowplug reports up to the second token."""
    report = glowplug.report(model).as_dict()
    record |= {key: report[key] for key in ("phases", "pieces", "distinct_pieces", "pending_pieces", "experts")}


def _fallbacks(strategy: Strategy, model: PreTrainedModel) -> list[str]:
    if strategy.compiles_by == "glowplug":
        return [fallback.reason for fallback in glowplug.report(model).fallbacks]
    if not hit_recompile_limit():
        return []
    return [f"Dynamo hit its recompile limit ({torch._dynamo.config.recompile_limit}); calls past it run eager"]


def _peak_rss_mb() -> float:
    """The largest resident set size of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
