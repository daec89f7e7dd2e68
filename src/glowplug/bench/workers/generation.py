"""One generation of the demo in a process of its own: `python -m glowplug.bench.workers.generation '<json spec>'`.

The last line of its output is the result as JSON.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.generation import BaseStreamer

import glowplug
from glowplug.bench.models import load_model
from glowplug.bench.spec import Spec
from glowplug.bench.strategies import get_strategy, hit_recompile_limit
from glowplug.bench.workers.isolate import run_worker
from glowplug.engine import attach
from glowplug.frontends.hf.front import HfFrontEnd
from glowplug.options import Options


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One generation to run.

    Attributes:
        folder: the checkpoint, with its tokenizer.
        strategy: a name in `STRATEGIES`.
        prompt: text to continue.
        depth: number of layers to keep; None for all.
        tokens: the largest number of tokens to add.
        compiler: glowplug's piece compiler. Experts are opaque, so that identity matters.
        check_order: False turns off both guards of `ordered`: the order check and the comparison with eager.
        settle: wait at the end until what is compiled in the background has been stored, too.
    """

    folder: str
    strategy: str
    prompt: str
    depth: int | None = None
    tokens: int = 40
    compiler: str = "inductor"
    check_order: bool = True
    settle: bool = False

    def to_json(self) -> str:
        """The generation as one line of JSON."""
        return json.dumps(asdict(self))


class TokenClock(BaseStreamer):
    """Records when each token arrives. `generate` first passes the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Record the time of the prompt or of a token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to finish."""


def generate(wanted: Generation) -> dict[str, Any]:
    """Generate with the uncompiled model for comparison, then compile it and generate twice, cold and warm.

    Returns:
        first_token_s (from the compile call), ms_per_token (in the second generation, after its first token), tokens,
        text, expected (the tokens of the model before it was compiled), expected_text, layers, traced_layers (at all
        if it is None), pieces, distinct_pieces, fallback (sentences).
    """
    tokenizer = AutoTokenizer.from_pretrained(wanted.folder, local_files_only=True)
    model = load_model(wanted.folder, depth=wanted.depth)
    inputs = tokenizer(wanted.prompt, return_tensors="pt")
    expected, _ = _run(model, inputs, wanted.tokens)
    start = time.perf_counter()
    _apply(model, wanted)
    tokens, clock = _run(model, inputs, wanted.tokens)
    first_token_s = clock.times[1] - start
    _, warm = _run(model, inputs, wanted.tokens)
    result: dict[str, Any] = {
        "first_token_s": first_token_s,
        "ms_per_token": 1000 * (warm.times[-1] - warm.times[1]) / max(len(warm.times) - 2, 1),
        "tokens": tokens,
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "expected": expected,
        "expected_text": tokenizer.decode(expected, skip_special_tokens=True),
        "layers": model.config.get_text_config().num_hidden_layers,
        "traced_layers": None,
        "pieces": None,
        "distinct_pieces": None,
        "fallback": ["hit Dynamo's recompile limit: what came later ran eager"] if hit_recompile_limit() else [],
    }
    if get_strategy(wanted.strategy).compiles_by == "glowplug":
        report = glowplug.report(model)
        result |= {"pieces": report.pieces, "distinct_pieces": report.distinct_pieces}
        traced = 0 if report.start == "warm" else report.template_layers or result["layers"]
        result |= {"traced_layers": traced, "fallback": [fallback.reason for fallback in report.fallbacks]}
        if wanted.settle:
            glowplug.settle(model)
    return result


def _apply(model: nn.Module, wanted: Generation) -> None:
    if wanted.check_order:
        spec = Spec(model=wanted.folder, depth=1, strategy=wanted.strategy, experts="opaque", compiler=wanted.compiler)
        get_strategy(wanted.strategy).apply(model, spec)
        return
    options = Options(identity=wanted.strategy, experts="opaque", compiler=wanted.compiler, verify="off")  # type: ignore[arg-type]
    attach(HfFrontEnd, model, options, check_order=False)


def _run(model: PreTrainedModel, inputs: Any, tokens: int) -> tuple[list[int], TokenClock]:
    clock = TokenClock()
    with torch.no_grad():
        ids: Any = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, streamer=clock)
    return ids[0, inputs["input_ids"].shape[1] :].tolist(), clock


def main() -> None:
    """Print the result as JSON. Errors are long: one part of the demo shows an error in full."""
    run_worker(
        lambda wanted: {**generate(Generation(**wanted)), "error": None}, lambda _, error: {"error": error}, limit=1000
    )


if __name__ == "__main__":
    main()
