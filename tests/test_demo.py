"""`glowplug demo`: what it runs, what its table and texts say, and the sentences at its end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from glowplug.bench import demo as bench_demo
from glowplug.bench.demo import AGAIN, ORDER, PROMPT, SHORT, START, start_steps
from glowplug.bench.models import load_model
from glowplug.bench.starts import Started
from glowplug.bench.workers.generation import Generation, generate
from glowplug.bench.workers.isolate import IsolatedError
from glowplug.checkpoints import find_checkpoint
from glowplug.cli import app

LAYERS = 24


class Answers:
    """Stands in for `Isolated`: answers at once. Class attributes say how; `begun` lists what was begun."""

    begun: list[tuple[Generation, dict[str, str] | None]]
    wrong: set[str]
    dead: set[str]

    def __init__(
        self, module: str, argument: str, *, timeout_s: float, extra: dict[str, str] | None, forked: bool
    ) -> None:
        self.wanted = Generation(**json.loads(argument))
        self.begun.append((self.wanted, extra))

    def answer(self) -> dict[str, Any]:
        wanted = self.wanted
        if wanted.strategy in self.dead:
            raise IsolatedError("the process was killed by SIGKILL")
        if wanted.folder.endswith(ORDER) and wanted.strategy == "ordered" and wanted.check_order:
            return {"error": "LayerOrderError: a layer ran twice"}
        wrong = not wanted.check_order or wanted.strategy in self.wrong
        stamped = wanted.strategy == "stamped"
        return {
            "first_token_s": {"baked": 12.5, "stamped": 5.25 if wanted.settle else 0.75}.get(wanted.strategy, 8.0),
            "ms_per_token": 2.5,
            "layers": wanted.depth or LAYERS,
            "traced_layers": 4 if stamped else LAYERS if wanted.strategy in ("baked", "ordered", "hoisted") else None,
            "pieces": 25,
            "distinct_pieces": 3,
            "fallback": [],
            "expected": [1, 2],
            "tokens": [1, 3] if wrong else [1, 2],
            "error": None,
            "text": " [GARBAGE]" if wrong else " is right",
            "expected_text": " is right",
        }

    def close(self) -> None: ...


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> type[Answers]:
    """The demo without processes."""
    Answers.begun, Answers.wrong, Answers.dead = [], set(), set()
    monkeypatch.setattr(bench_demo, "Isolated", Answers)
    return Answers


def run(*arguments: str) -> tuple[int, str]:
    """The command's exit code and its output on one line."""
    result = CliRunner().invoke(app, ["demo", *arguments])
    return result.exit_code, " ".join(result.output.split())


def test_the_demo_compares_shows_texts_and_ends_with_three_sentences(answers: type[Answers]) -> None:
    code, output = run()
    assert code == 0, output
    assert "about two minutes" in output
    for name in ("eager", "torch-regional", "baked", "ordered", "hoisted", "stamped", AGAIN):
        assert f" of 7 {name} (" in output
    assert f"eager, baked, ordered, hoisted, stamped, {AGAIN} wrote: {PROMPT} is right" in output
    assert f"ordered, checks off: garbage, and no error {PROMPT} [GARBAGE]" in output
    assert "ordered: refused LayerOrderError: a layer ran twice" in output
    assert f"hoisted: the text that eager writes {PROMPT} is right" in output
    sentences = output.split(" - ")[-3:]
    assert sentences[0].startswith(
        "glowplug's default, stamped, wrote its first token after 5.25 s, and baked after 12.50 s"
    )
    assert "of 24 layers it traced 4, and of 25 pieces it compiled 3" in sentences[0]
    assert sentences[1].startswith("Started again, it wrote its first token after 0.750 s")
    assert "wrote exactly what eager writes" in sentences[2] and "garbage on tiny-ernie-vl" in sentences[2]


def test_a_short_run_is_labelled(answers: type[Answers]) -> None:
    assert f"torch-regional ran on the first {SHORT} layers alone" in run()[1]
    assert [(wanted.strategy, wanted.depth) for wanted, _ in answers.begun if wanted.depth] == [
        ("torch-regional", SHORT)
    ]


def test_only_stamped_and_its_second_start_share_a_store(answers: type[Answers]) -> None:
    run()
    shared = [(wanted, extra["GLOWPLUG_CACHE"]) for wanted, extra in answers.begun if extra]
    assert [wanted.strategy for wanted, _ in shared] == ["stamped", "stamped"]
    assert [wanted.settle for wanted, _ in shared] == [True, False]
    assert shared[0][1] == shared[1][1] and not Path(shared[0][1]).exists()


def test_all_runs_full_depth_and_the_ways_to_start(answers: type[Answers], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glowplug.cli.demo.run_ways", lambda start, ways: map(_start, ways))
    code, output = run("--all")
    assert code == 0, output
    assert not any(wanted.depth for wanted, _ in answers.begun)
    assert "alone" not in output
    for way in ("eager", "cold", "warm", "background"):
        assert f"{way}: second token after 0.500 s" in output


def test_without_a_store_there_is_no_second_start(answers: type[Answers]) -> None:
    code, output = run("--compiler", "eager")
    assert code == 0, output
    assert AGAIN not in output and "Started again" not in output


@pytest.mark.parametrize("how", ["wrong", "dead"])
def test_the_demo_fails_when_a_strategy_does(answers: type[Answers], how: str) -> None:
    getattr(answers, how).add("hoisted")
    code, output = run()
    assert code == 1
    assert "Something is wrong here: hoisted failed, or wrote other tokens" in output
    assert ("hoisted wrote: The with statement [GARBAGE]" in output) == (how == "wrong")


def test_the_demo_fails_when_a_start_writes_other_tokens(
    answers: type[Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glowplug.cli.demo.run_ways", lambda *_: iter([_start("background", equal=False)]))
    code, output = run("--all")
    assert code == 1
    assert "NOT all eager's" in output


def _start(way: str, *, equal: bool = True) -> Started:
    report = {"distinct_pieces": 3, "pieces": 5, "start": "cold", "fallbacks": []}
    result = {"load_s": 0.1, "first_token_s": 0.2, "second_token_s": 0.5, "error": 0.0, "report": report}
    return Started(way, result | (_served(equal) if way == "background" else {}))


def _served(equal: bool) -> dict[str, Any]:
    return {"tokens_equal": equal, "steps": 9, "compared": 17, "others": 0 if equal else 2}


# -- what the steps run --------------------------------------


@pytest.mark.parametrize("name", ["eager", "hoisted", "stamped"])
def test_one_step(name: str) -> None:
    (wanted,) = (step.generation for step in start_steps("eager", stores=False, everything=True) if step.name == name)
    result = generate(wanted)
    assert result["tokens"] == result["expected"]
    assert len(result["tokens"]) == wanted.tokens
    assert result["first_token_s"] > 0 and result["ms_per_token"] > 0
    assert result["fallback"] == []
    assert result["layers"] == LAYERS
    if name == "eager":
        assert (result["pieces"], result["traced_layers"]) == (None, None)
    else:
        assert (result["pieces"], result["distinct_pieces"]) == (LAYERS + 1, 3)
        assert result["traced_layers"] == LAYERS if name == "hoisted" else 1 < result["traced_layers"] < 8


def test_a_step_on_the_first_layers_alone() -> None:
    wanted = Generation(
        folder=str(find_checkpoint(START)), strategy="hoisted", prompt=PROMPT, depth=SHORT, tokens=4, compiler="eager"
    )
    result = generate(wanted)
    assert result["layers"] == result["traced_layers"] == SHORT
    assert result["tokens"] == result["expected"]


def test_the_shipped_model_is_deep_small_and_trained() -> None:
    model, folder = load_model(START), find_checkpoint(START)
    assert model.dtype == torch.float32
    assert model.config.layer_types == ["sliding_attention", "full_attention"] * (LAYERS // 2)
    assert (folder / "model.safetensors").stat().st_size < 3_000_000
    sentence = "The method returns a new list of all the objects, and raises an exception if there is none."
    ids = AutoTokenizer.from_pretrained(folder)(sentence, return_tensors="pt")["input_ids"]
    nats = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
    assert nats / math.log(2) / len(sentence) < 2.5
