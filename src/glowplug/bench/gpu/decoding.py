"""Times the tokens of `generate`, called as people call it."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from glowplug.bench.stepping import finish

NEW_TOKENS = 112
"""The new tokens that every static cache has room for, so that all are of one size. With a prompt of 16 they just fill
gpt-oss's window of 128, so that all steps are alike."""
WARM_UP = 16
"""The tokens of a generation before its steps are timed."""


class Clock(StoppingCriteria):
    """Waits for each token and notes when it is there. Stops after `tokens`, or `cap_s` seconds after the warm-up.

    `on_token` is called with the number of tokens so far.
    """

    def __init__(self, tokens: int, cap_s: float = math.inf, on_token: Callable[[int], None] | None = None) -> None:
        self.tokens, self.cap_s, self.on_token = tokens, cap_s, on_token
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Called by `generate` after each token; returns whether each sequence is finished."""
        finish(input_ids.device)
        self.times.append(time.perf_counter())
        count = len(self.times)
        if self.on_token is not None:
            self.on_token(count)
        done = count >= self.tokens or (count > WARM_UP and self.times[-1] - self.times[WARM_UP - 1] >= self.cap_s)
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)

    def step_s(self) -> float:
        """Median seconds of a step after the warm-up."""
        times = self.times[WARM_UP - 1 :]
        return statistics.median(after - before for before, after in itertools.pairwise(times))


@dataclass(frozen=True)
class Decoder:
    """Greedy generation with one model.

    Attributes:
        model: the model.
        auto_compile: whether transformers may compile the steps over a static cache by itself.
    """

    model: PreTrainedModel
    auto_compile: bool = False

    def generate(self, ids: Tensor, clock: Clock, *, static: bool = True, logits: bool = False) -> Any:
        """Continue prompts of equal length until the clock stops it.

        Returns:
            The token ids, prompts included; with `logits` all that `generate` returns.
        """
        cache = {"cache_implementation": "static", "disable_compile": not self.auto_compile} if static else {}
        generator: Any = self.model
        return generator.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,  # no end of text stops it
            stopping_criteria=StoppingCriteriaList([clock]),
            return_dict_in_generate=logits,
            output_logits=logits,
            **cache,
        )

    def tokens(self, ids: Tensor, count: int) -> list[int]:
        """The next tokens of one prompt, over a static cache."""
        return self.generate(ids, Clock(count))[0, ids.shape[1] :].tolist()

    def step_s(self, ids: Tensor, cap_s: float, *, static: bool = True) -> float:
        """Median seconds between two tokens after the warm-up, in at most `cap_s` seconds."""
        clock = Clock(NEW_TOKENS, cap_s)
        self.generate(ids, clock, static=static)
        return clock.step_s()
