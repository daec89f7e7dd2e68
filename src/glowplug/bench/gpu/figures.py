"""The figures of one strategy on a GPU, in the record's `gpu`. A figure that can't be measured is its error's text."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

import glowplug
from glowplug.bench.gpu.decoding import NEW_TOKENS, Clock, Decoder
from glowplug.bench.gpu.launches import count_launches
from glowplug.bench.models import one_line
from glowplug.bench.results.record import Record
from glowplug.bench.spec import Spec
from glowplug.bench.stepping import Sequence, Text, finish, relative_error, times_s
from glowplug.bench.strategies import Strategy, layer_stack

BATCH = 16
"""Sequences at once in `static_tokens_s_16`."""
COMPARED = 64
"""Tokens compared with eager's."""
_STEPS = 96
"""Steps timed in `step_ms`."""
_READY = 4
"""The token of the third decode step: the second step of a form is recorded, the third is the first that is replayed
alone."""


def start(model: PreTrainedModel, strategy: Strategy, spec: Spec, record: Record) -> list[int]:
    """Compile a model and generate over a static cache; fills in `cold_start_s`, `ready_s` and `max_rel_err`.

    Returns:
        Eager's tokens.
    """
    ids = _prompts(model, 1, spec.prefill)
    expected = Decoder(model).generate(ids, Clock(COMPARED), logits=True)
    finish(model.device)
    clock, begin = Clock(_READY), time.perf_counter()
    strategy.apply(model, spec)
    actual = Decoder(model, strategy.auto_compile).generate(ids, clock, logits=True)
    record["cold_start_s"] = round(clock.times[1] - begin, 4)
    record["gpu"] = {"ready_s": round(clock.times[_READY - 1] - begin, 4)}
    tokens, others = (output.sequences[0, spec.prefill :].tolist() for output in (expected, actual))
    # The second step reads the first token, so that it compares only if that is eager's.
    compared = 2 if tokens[0] == others[0] else 1
    pairs = zip(actual.logits[:compared], expected.logits[:compared], strict=True)
    record["max_rel_err"] = max(relative_error(a, e) for a, e in pairs)
    return tokens


def add_figures(
    model: PreTrainedModel,
    strategy: Strategy,
    spec: Spec,
    record: Record,
    expected: list[int],
    keep: Callable[[Record], None],
) -> None:
    """Measure the figures one after the other, and keep the record after each.

    Args:
        model: the compiled model.
        strategy, spec: what it was compiled with.
        record: receives the figures.
        expected: eager's tokens.
        keep: is called with the record after each figure, as the next one may take too long.
    """
    decoder = Decoder(model, strategy.auto_compile)
    one = _prompts(model, 1, spec.prefill)
    figures: dict[str, Callable[[], Any]] = {
        "step_ms": lambda: None if strategy.auto_compile else round(_step_s(model, spec) * 1000, 4),
        "static_ms": lambda: round(decoder.step_s(one, spec.steady_s) * 1000, 4),
        "tokens_equal_eager": lambda: leading_equal(decoder.tokens(one, len(expected)), expected),
        "dynamic_ms": lambda: round(decoder.step_s(one, spec.steady_s, static=False) * 1000, 4),
        "launches": lambda: count_launches(decoder, one, len(layer_stack(model))),
        "static_tokens_s_16": lambda: round(
            BATCH / decoder.step_s(_prompts(model, BATCH, spec.prefill), spec.steady_s), 1
        ),
        "graphs": lambda: asdict(glowplug.report(model).cuda_graphs) if strategy.compiles_by == "glowplug" else None,
    }
    for name, measure in figures.items():
        try:
            record["gpu"][name] = measure()
        except Exception as exc:  # the other figures are worth having
            record["gpu"][name] = f"{type(exc).__name__}: {one_line(exc)}"
        keep(record)


def _step_s(model: PreTrainedModel, spec: Spec) -> float:
    """Median seconds of a step over a static cache, the model called step by step."""
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=spec.prefill + NEW_TOKENS)
    sequence = Sequence(model, Text.make(model, spec.prefill + NEW_TOKENS), cache)
    with torch.no_grad():
        sequence.step(spec.prefill)
        return statistics.median(times_s(lambda: sequence.step(1), model.device, _STEPS, spec.steady_s))


def leading_equal(tokens: list[int], expected: list[int]) -> int:
    """How many tokens are the expected ones before the first that is not."""
    equal = [token == wanted for token, wanted in zip(tokens, expected, strict=False)]
    return equal.index(False) if False in equal else len(equal)


def _prompts(model: PreTrainedModel, count: int, tokens: int) -> Tensor:
    return Text.make(model, count * tokens).ids.view(count, tokens)
