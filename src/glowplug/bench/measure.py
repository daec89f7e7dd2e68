"""Measures one strategy on one model, in this process: cold start, error against eager, steady state, memory."""

from __future__ import annotations

import functools
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import glowplug
from glowplug.bench.models import load_model
from glowplug.bench.overhead import OVERHEAD_STEPS, overhead_us
from glowplug.bench.results.record import Record, empty_record
from glowplug.bench.spec import Spec
from glowplug.bench.strategies import Strategy, get_strategy, hit_recompile_limit
from glowplug.bench.workers.turns import my_turns

PREFILL = 128
"""Tokens of the prompt of the steady-state prefill."""
STEPS = 40
"""The largest number of decode steps in the steady state."""
_STEPS_A_TURN = 8
_WARM_UP = 3


@dataclass(frozen=True)
class Text:
    """Random text for one sequence.

    Attributes:
        ids: token ids, `[1, tokens]`.
        position_ids: `[..., 1, tokens]`, as `generate` makes them for the model.
    """

    ids: Tensor
    position_ids: Tensor

    @classmethod
    def make(cls, model: PreTrainedModel, tokens: int) -> Text:
        """Seeded text of a length for a model, on its device."""
        generator = torch.Generator().manual_seed(1)
        vocab = model.config.get_text_config().vocab_size
        ids = torch.randint(vocab, (1, tokens), generator=generator).to(model.device)
        prepare: Any = getattr(model, "_prepare_position_ids_for_generation", None)
        positions = prepare(ids, {}) if prepare is not None else torch.arange(tokens, device=ids.device)[None]
        return cls(ids, positions)


class Sequence:
    """One sequence that a model reads step by step, with a cache of its own."""

    def __init__(self, model: PreTrainedModel, text: Text) -> None:
        self.model = model
        self.text = text
        self.read = 0
        self.cache = DynamicCache(config=model.config.get_text_config())

    def step(self, tokens: int) -> Tensor:
        """Read the next tokens; returns their logits, `[1, tokens, vocab]`."""
        part = slice(self.read, self.read + tokens)
        output = self.model(
            input_ids=self.text.ids[:, part].contiguous(),
            position_ids=self.text.position_ids[..., part].contiguous(),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.read += tokens
        return output.logits


def measure(spec: Spec) -> Record:
    """Measure one strategy in this process; raises whatever the strategy raises."""
    strategy = get_strategy(spec.strategy)
    record = empty_record(spec)
    model = load_model(spec.model, depth=spec.depth, width=spec.width, device=spec.device, dtype=spec.dtype)
    text = Text.make(model, max(PREFILL, spec.prefill + _WARM_UP + STEPS + 1, spec.prefill + OVERHEAD_STEPS))
    with torch.no_grad():
        expected, _ = two_tokens(model, text, spec.prefill)
        _finish(model.device)
        start = time.perf_counter()
        strategy.apply(model, spec)
        actual, _ = two_tokens(model, text, spec.prefill)
        _finish(model.device)
        record["cold_start_s"] = round(time.perf_counter() - start, 4)
        record["max_rel_err"] = max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))
        if strategy.compiles_by == "glowplug":
            _add_report(record, model)
        glowplug.settle(model)
        record["steady_ms"] = _steady_ms(model, text, spec)
        if strategy.compiles_by == "glowplug":
            sequence = Sequence(model, text)
            sequence.step(spec.prefill)
            record["overhead_us"] = overhead_us(model, lambda: sequence.step(1))
    record["fallback"] = _fallbacks(strategy, model)
    record["peak_rss_mb"] = _peak_rss_mb()
    if model.device.type == "cuda":
        record["cuda_peak_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return record


def two_tokens(model: PreTrainedModel, text: Text, prefill: int) -> tuple[list[Tensor], list[float]]:
    """A prefill and one decode step: their logits, and the seconds after which each greedy token was there.

    The decode step reads the text's own next token whatever the prefill chose, so that two runs have equal inputs.
    """
    sequence, start = Sequence(model, text), time.perf_counter()
    logits: list[Tensor] = []
    times: list[float] = []
    for tokens in (prefill, 1):
        logits.append(sequence.step(tokens))
        int(logits[-1][0, -1].argmax())  # waits for the token, as `generate` does
        times.append(time.perf_counter() - start)
    return logits, times


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max|actual - expected| / max|expected|.

    Raises:
        RuntimeError: shapes differ, or a value is not finite.
    """
    if actual.shape != expected.shape:
        raise RuntimeError(f"the logits have shape {tuple(actual.shape)}, eager's {tuple(expected.shape)}")
    expected = expected.float()
    error = float((actual.float() - expected).abs().max() / expected.abs().max())
    if not math.isfinite(error):
        raise RuntimeError("the logits, or eager's, are not finite")
    return error


def _steady_ms(model: PreTrainedModel, text: Text, spec: Spec) -> dict[str, float]:
    """Median ms of a decode step and of a prefill, measured at once or in turns with other strategies' processes."""
    turns = my_turns()
    decode: list[float] = []
    prefill: list[float] = []
    for _ in [None] if turns is None else turns:
        steps, cap_s = (STEPS, spec.steady_s) if turns is None else (_STEPS_A_TURN, spec.steady_s / 10)
        sequence = Sequence(model, text)
        sequence.step(spec.prefill)
        decode += _times_s(functools.partial(sequence.step, 1), model.device, steps, cap_s)
        prefill += _times_s(lambda: Sequence(model, text).step(PREFILL), model.device, steps, cap_s)
    measured = {"decode": decode, "prefill128": prefill}
    return {name: round(statistics.median(times) * 1000, 4) for name, times in measured.items() if times}


def _times_s(step: Callable[[], Tensor], device: torch.device, steps: int, cap_s: float) -> list[float]:
    """Seconds of each of `steps` steps, or of as many as fit into `cap_s` seconds, after a warm-up."""
    for _ in range(_WARM_UP):
        step()
    _finish(device)
    times: list[float] = []
    while len(times) < steps and (not times or sum(times) < cap_s):
        start = time.perf_counter()
        step()
        _finish(device)
        times.append(time.perf_counter() - start)
    return times


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


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_rss_mb() -> float:
    """The largest resident set size of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
