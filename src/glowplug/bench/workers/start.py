"""One start of a model folder in a process of its own: `python -m glowplug.bench.workers.start '<json>'`.

The last line of its output is what it measured, as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import glowplug
from glowplug.bench.stepping import Sequence, Text, relative_error, two_tokens
from glowplug.bench.workers.isolate import run_worker
from glowplug.frontends.hf.builds import auto_class, read_config

WAYS = ("eager", "load", "cold", "warm", "background", "from_pretrained", "fleet")
PREFILL = 16
_PATIENCE_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start.

    Attributes:
        folder: the model's folder.
        way: one of `WAYS`. `"load"`: only load the weights. `"fleet"`: cold or warm, depending on the store.
        experts: glowplug's option.
        device: `"cpu"` or `"cuda"`.
        dtype: of the weights.
        steps: decode steps of a sequence while `"background"` serves eager.
        evict: drop the weight files from the page cache first, so that loading reads the disk.
    """

    folder: str
    way: str = "cold"
    experts: str = "auto"
    device: str = "cpu"
    dtype: str = "float32"
    steps: int = 300
    evict: bool = False

    def to_json(self) -> str:
        """As one line of JSON."""
        return json.dumps(dataclasses.asdict(self))


def run(start: Start) -> dict[str, Any]:
    """Start a model.

    Returns:
        load_s (loading weights), first_token_s and second_token_s (from the compile call), eager_first_token_s (the
        same model before it was compiled), ready_s (loading and both tokens, without imports), error (against eager;
        for eager itself in half precision: against the same weights in float32, with its dtype in rounds_to), report.
    """
    if start.evict:
        _evict(start.folder)
    begin = time.perf_counter()
    model = _load(start)
    result: dict[str, Any] = {"way": start.way, "load_s": time.perf_counter() - begin}
    if start.way == "load":
        return result
    text = Text.make(model, PREFILL + start.steps + 64)
    with torch.no_grad():
        expected: list[torch.Tensor] = []
        if start.way != "from_pretrained":
            expected, times = two_tokens(model, text, PREFILL)
            result["eager_first_token_s"], result["eager_second_token_s"] = times
        compiled = time.perf_counter()
        if start.way != "eager" and start.way != "from_pretrained":
            glowplug.compile(model, experts=start.experts, background=start.way == "background")
        actual, times = two_tokens(model, text, PREFILL)
        setup = time.perf_counter() - compiled - times[1]
        result["first_token_s"], result["second_token_s"] = times[0] + setup, times[1] + setup
        result["ready_s"] = result["load_s"] + result["second_token_s"]
        if not expected:
            expected = _eager_tokens(model, text)
        result["error"] = max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))
        if start.way == "eager" and start.dtype != "float32":
            result |= _rounding(model, text, expected, start.dtype)
        if start.way == "background":
            result |= _until_taken_over(model, text, compiled, start.steps)
        if start.way != "eager":
            settled = time.perf_counter()
            glowplug.settle(model)
            result["settle_s"] = time.perf_counter() - settled
            result["report"] = glowplug.report(model).as_dict()
    return result


def _load(start: Start) -> PreTrainedModel:
    settings: dict[str, Any] = {"dtype": getattr(torch, start.dtype)}
    if start.device != "cpu":
        settings["device_map"] = start.device
    if start.way == "from_pretrained":
        model: PreTrainedModel = glowplug.from_pretrained(start.folder, experts=start.experts, **settings)
        return model
    model = auto_class(read_config(Path(start.folder))).from_pretrained(start.folder, **settings)
    model.requires_grad_(False)
    return model.eval()


def _eager_tokens(model: PreTrainedModel, text: Text) -> list[torch.Tensor]:
    """The logits of both tokens from the model's own forward."""
    engine = model.__dict__.pop("forward")
    try:
        return two_tokens(model, text, PREFILL)[0]
    finally:
        object.__setattr__(model, "forward", engine)


def _rounding(model: PreTrainedModel, text: Text, rounded: list[torch.Tensor], dtype: str) -> dict[str, Any]:
    """How far the model's own forward in its dtype is from that in float32, the least error to expect of any start.

    Converts the model to float32 in place. Empty if the memory is too small for that.
    """
    try:
        exact = two_tokens(model.float(), text, PREFILL)[0]
    except torch.OutOfMemoryError:
        return {}
    return {"error": max(relative_error(a, e) for a, e in zip(rounded, exact, strict=True)), "rounds_to": dtype}


def _until_taken_over(model: PreTrainedModel, text: Text, compiled: float, steps: int) -> dict[str, Any]:
    """Decode until the compiled program serves, and a little longer.

    Compares the tokens of the sequence in which the program takes over with eager's.
    """
    tokens: list[int] = []
    eager_steps = 0
    sequence = Sequence(model, text)
    step_s = 0.0
    while _under_way(model) and time.perf_counter() - compiled < _PATIENCE_S:
        if not tokens or len(tokens) >= steps:
            sequence, tokens = Sequence(model, text), []
            sequence.step(PREFILL)
        begin = time.perf_counter()
        tokens.append(int(sequence.step(1)[0, -1].argmax()))
        step_s = time.perf_counter() - begin
        eager_steps += 1
    taken_over_s = time.perf_counter() - compiled
    tokens += [int(sequence.step(1)[0, -1].argmax()) for _ in range(8)]
    engine = model.__dict__.pop("forward")
    reference = Sequence(model, text)
    reference.step(PREFILL)
    others = sum(int(reference.step(1)[0, -1].argmax()) != token for token in tokens)
    object.__setattr__(model, "forward", engine)
    return {
        "taken_over_s": taken_over_s,
        "switch_s": step_s,
        "steps": eager_steps,
        "tokens_equal": others == 0,
        "compared": len(tokens),
        "others": others,
    }


def _under_way(model: PreTrainedModel) -> bool:
    """Whether eager still serves while the program is being built."""
    report = glowplug.report(model)
    return report.strategy == "eager" and not report.fallbacks


def _evict(folder: str) -> None:
    """Drop the weight files from the page cache."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    run_worker(lambda start: run(Start(**start)), lambda start, error: {"way": Start(**start).way, "failed": error})
