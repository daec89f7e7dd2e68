"""`glowplug starts`: what it refuses, what it counts, and one run of it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from glowplug.bench.presets import build_model
from glowplug.bench.starts import DEFAULT_WAYS, Started, compilations, medians, model_folder
from glowplug.bench.workers.start import Start
from glowplug.bench.workers.start import run as run_start
from glowplug.cli.starts import print_starts
from glowplug.errors import UsageError
from test_cli import assert_refused, run


def shown(starts: list[Started]) -> list[str]:
    """The rows and notes that a terminal of 80 columns shows."""
    console = Console(width=80, record=True, file=io.StringIO())
    print_starts(console, starts)
    return [line for line in console.export_text().splitlines() if line[0] not in "┏┃┡└"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["glm-4.7", "--ways", "cold,tepid"], ["'tepid'", "background"]),
        (["glm-4.7", "--ways", ","], ["--ways"]),
        (["glm-4.7", "--ways", "warm,cold"], ["--ways cold,warm"]),
        (["glm-4.7", "--fleet", "-1"], ["--fleet", "-1"]),
        (["glm-4.7", "--rounds", "0"], ["--rounds"]),
        (["glm-4.7", "--width", "broad"], ["tiny or full"]),
        (["glm-4.7", "--depth", "0"], ["at least 1"]),
        (["glm-4.7", "--experts", "maybe"], ["'maybe'"]),
        (["glm-4.7", "--dtype", "int8"], ["bfloat16", "'int8'"]),
        (["glm-4.7", "--device", "tpu"], ["'tpu'"]),
        (["glm-4.8"], ["glm-4.8"]),
        (["tiny-gpt-oss", "--depth", "2"], ["--depth", "its own"]),
        (["glm-4.7", "--json", "no/such/folder/x.json"], ["no/such/folder"]),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], said: list[str]) -> None:
    assert_refused(run("starts", *arguments), *said)


@pytest.mark.parametrize(("depth", "all_experts"), [(3, False), (None, True)])
def test_a_folder_has_its_own_sizes(depth: int | None, all_experts: bool, tmp_path: Path) -> None:
    build_model("gpt-oss-20b", depth=1).save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="its own"):
        model_folder(str(tmp_path / "model"), depth, "tiny", "float32", tmp_path, all_experts=all_experts)


def test_all_experts_of_the_released_model(tmp_path: Path) -> None:
    folder = model_folder("gpt-oss-20b", 1, "tiny", "float32", tmp_path, all_experts=True)
    assert json.loads(Path(folder, "config.json").read_text())["num_local_experts"] == 32


def test_a_fleet_is_counted_over_all_its_processes() -> None:
    reports = [{"compiled_pieces": 3, "distinct_pieces": 4}, {"compiled_pieces": 1, "distinct_pieces": 4}]
    fleet = [Started("fleet", {"report": report}) for report in reports]
    assert compilations([*fleet, Started("fleet", {}, "killed")]) == (4, 4)


def test_the_table_says_when_tokens_were_not_eagers() -> None:
    report = {"distinct_pieces": 3, "pieces": 5, "start": "warm", "fallbacks": [{"reason": "too odd"}]}
    tokens = {"tokens_equal": False, "steps": 7, "compared": 5, "others": 2}
    result = {"second_token_s": 0.5, "taken_over_s": 9.0, "report": report, **tokens}
    row, note = shown([Started("background", result)])[-2:]
    assert row.replace("│", "").split() == ["background", "-", "-", "0.50", "-", "9.00", "-"]
    assert "NOT all eager's: 2 of the last 5 differ" in note and "too odd" in note


def test_the_table_of_starts_is_no_wider_than_a_terminal() -> None:
    lines = shown([Started(way, {"load_s": 123.4, "ready_s": 123.4}) for way in DEFAULT_WAYS])
    assert not any("…" in line for line in lines)
    assert [line.split()[1] for line in lines[-len(DEFAULT_WAYS) :]] == list(DEFAULT_WAYS)


def test_of_several_rounds_the_medians_are_shown() -> None:
    times = [
        Started("load", {"load_s": 3.0}),
        *(
            Started("cold", {"ready_s": ready, "error": error})
            for ready, error in ((9.0, 1e-6), (1.0, 2e-6), (4.0, 0.0))
        ),
        Started("warm", {"ready_s": 2.0}),
        Started("warm", {}, "killed"),
        Started("load", {"load_s": 4.0}),
    ]
    load, cold, warm = medians(times)
    assert load.result == {"load_s": 3.5}
    assert cold.result == {"ready_s": 4.0, "error": 2e-6}
    assert warm.error == "killed"


def test_tokens_of_all_rounds_are_counted() -> None:
    rounds = [
        Started("background", {"tokens_equal": others == 0, "steps": 7, "compared": 15, "others": others})
        for others in (2, 0)
    ]
    (background,) = medians(rounds)
    assert background.result == {"tokens_equal": False, "steps": 7, "compared": 30, "others": 2}


def test_half_precision_is_measured_against_float32(tmp_path: Path) -> None:
    folder = model_folder("gpt-oss-20b", 2, "tiny", "bfloat16", tmp_path)
    half = run_start(Start(folder=folder, way="eager", dtype="bfloat16"))
    assert 1e-4 < half["error"] < 1.0
    assert shown([Started("eager", half)])[-1] == "eager: error of bfloat16 itself, against float32"
    whole = run_start(Start(folder=folder, way="eager"))
    assert whole["error"] == 0.0 and "rounds_to" not in whole


@pytest.mark.inductor
def test_cold_and_warm(tmp_path: Path) -> None:
    written = tmp_path / "starts.json"
    arguments = ("qwen3-30b-a3b", "--depth", "5", "--experts", "opaque", "--ways", "cold,warm")
    result = run("starts", *arguments, "--json", str(written))
    assert result.exit_code == 0, result.output
    told = json.loads(written.read_text())
    assert (told["model"], told["depth"], told["dtype"]) == ("qwen3-30b-a3b", 5, "float32")
    cold, warm = told["starts"]
    assert (cold["report"]["start"], warm["report"]["start"]) == ("cold", "warm")
    assert cold["report"]["compiled_pieces"] > 0 and warm["report"]["compiled_pieces"] == 0
    assert max(cold["error"], warm["error"]) < 1e-3
