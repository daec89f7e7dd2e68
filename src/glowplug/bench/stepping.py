"""Reads random text step by step, and compares logits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

WARM_UP = 3
"""Steps before those that are timed."""


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
    """One sequence that a model reads step by step, with a cache of its own: by default one that grows."""

    def __init__(self, model: PreTrainedModel, text: Text, cache: Cache | None = None) -> None:
        self.model = model
        self.text = text
        self.read = 0
        self.cache = cache if cache is not None else DynamicCache(config=model.config.get_text_config())

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


def times_s(step: Callable[[], Tensor], device: torch.device, steps: int, cap_s: float) -> list[float]:
    """Seconds of each of `steps` steps, or of as many as fit into `cap_s` seconds, after a warm-up."""
    for _ in range(WARM_UP):
        step()
    finish(device)
    times: list[float] = []
    while len(times) < steps and (not times or sum(times) < cap_s):
        start = time.perf_counter()
        step()
        finish(device)
        times.append(time.perf_counter() - start)
    return times


def finish(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
