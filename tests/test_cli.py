"""The command: what each one prints, and one line with exit code 2 for whatever the user got wrong."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

import glowplug
from glowplug.bench.presets import build_model
from glowplug.cli import app
from glowplug.report import StoreReport

PROMPT = "A plug glows"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved gpt-oss of three layers, with a tokenizer."""
    path = tmp_path_factory.mktemp("saved") / "model"
    build_model("gpt-oss-20b", depth=3).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def run(*arguments: str | Path) -> Any:
    """A command line, in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_refused(result: Any, *words: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr with these words."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("glowplug: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0]


# -- wrong input ------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "gpt-5"], ["gpt-5", "presets: gpt-oss-120b"]),
        (["bench", "glm-4.7", "--strategies", "fast"], ["'fast'", "torch-nested", "hoisted"]),
        (["bench", "glm-4.7", "--strategies", ","], ["no strategy"]),
        (["bench", "glm-4.7", "--depth", "0"], ["at least 1"]),
        (["bench", "glm-4.7", "--depth", "4,-1"], ["at least 1"]),
        (["bench", "glm-4.7", "--depth", "many"], ["--depth", "12,36", "'many'"]),
        (["bench", "glm-4.7", "--device", "tpu"], ["cpu or cuda"]),
        (["bench", "glm-4.7", "--experts", "hidden"], ["'inline', 'opaque'"]),
        (["bench", "glm-4.7", "--compiler", "gcc"], ["'gcc'", "inductor"]),
        (["bench", "glm-4.7", "--width", "wide"], ["tiny or full"]),
        (["bench", "glm-4.7", "--timeout", "0"], ["--timeout"]),
        (["bench", "glm-4.7", "--json", "no/such/folder/results.json"], ["can't write"]),
        (["bench", "glm-4.7", "--plot", "plot.docx"], ["plot.docx", "png"]),
        (["bench", "glm-4.7", "--plot", "no/such/folder/plot.png"], ["can't write"]),
        (["bench"], ["model"]),
        (["bench", "glm-4.7", "--fast"], ["--fast"]),
        (["warm"], ["warm"]),
        (["explain", "gpt-5"], ["presets"]),
        (["explain", "glm-4.7", "--depth", "0"], ["at least 1"]),
        (["explain", "glm-4.7", "--depth", "2", "--identity", "named"], ["'hoisted', 'ordered', 'baked'"]),
        (["generate", "no/such/folder", "--prompt", "x"], ["no such preset or folder"]),
        (["generate", "glm-4.7", "--prompt", "x"], ["preset", "local folder"]),
        (["generate", "glm-4.7", "--prompt", "x", "--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["generate", "tiny-gpt-oss", "--prompt", "x", "--report", __file__], ["--report", "is a file"]),
        (["bench", "glm-4.7", "--timeout", "nan"], ["--timeout"]),
        (["demo", "--compiler", "gcc"], ["'gcc'"]),
        (["cache"], ["ls, verify, or prune"]),
        (["cache", "prune", "--max-size", "1G", "--cache", ""], ["empty"]),
        (["sweep", "--families", ","], ["--families"]),
        (["sweep", "--families", "gpt2"], ["gpt2", "gpt_oss"]),
        (["sweep", "--families", "mixtral", "--depth", "0"], ["--depth"]),
        (["sweep", "--timeout", "nan"], ["--timeout"]),
        (["bake", "tiny-gpt-oss", "--width", "wide"], ["'wide'"]),
        (["bake", "tiny-gpt-oss", "--out", ""], ["empty"]),
        (["bake", "tiny-gpt-oss", "--out", "off"], ["--out"]),
        (["bake", "tiny-gpt-oss", "--out", __file__], ["not a folder"]),
    ],
    ids=lambda value: " ".join(value)[:60] if value and isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments: list[str], words: list[str]) -> None:
    assert_refused(run(*arguments), *words)


def test_a_bake_that_stores_nothing_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = glowplug.Report(
        programs=1, store=StoreReport(str(tmp_path), {"manifest misses": 1}, ("the disk is full",))
    )
    monkeypatch.setattr("glowplug.cli.bake.bake", lambda *_: SimpleNamespace(report=report))
    result = run("bake", "tiny-gpt-oss", "--out", tmp_path / "store")
    assert result.exit_code == 2
    assert result.stderr == "glowplug: the program was not stored: the disk is full\n"


def test_what_the_system_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "model/config.json")

    monkeypatch.setattr("glowplug.cli.explain.load_model", lambda *_, **__: refuse())
    assert_refused(run("explain", tmp_path), "Permission denied: model/config.json")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert_refused(run("cache", "ls", "--cache", tmp_path), "can't be read: permission denied")


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="needs a machine without CUDA")
def test_no_cuda() -> None:
    assert_refused(run("bench", "glm-4.7", "--device", "cuda"), "no CUDA device")


@pytest.mark.parametrize("command", [["bench"], ["explain"], ["generate", "--prompt", "x"]], ids=lambda c: c[0])
def test_broken_folders(command: list[str], folder: Path, tmp_path: Path) -> None:
    assert_refused(run(*command, tmp_path), "no config.json")
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    assert_refused(run(*command, tmp_path), "not a causal language model")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    assert_refused(run(*command, tmp_path), "not a whole safetensors file")


def test_generate_needs_a_tokenizer_that_fits(folder: Path, tmp_path: Path) -> None:
    assert_refused(run("generate", folder, "--prompt", ""), "--prompt has no tokens")
    assert_refused(run("generate", folder, "--prompt", "x", "--identity", "named"), "'hoisted', 'ordered', 'baked'")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert_refused(run("generate", tmp_path, "--prompt", "x"), "no tokenizer")


def test_the_module_runs_as_a_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "glowplug", "bench", "gpt-5"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "presets" in result.stderr


def test_help_lists_commands() -> None:
    for arguments in ([], ["--help"]):
        result = run(*arguments)
        assert result.exit_code == 0
        for command in ("bench", "generate", "explain", "demo"):
            assert command in result.stdout
    assert "glm-4.7" in run("bench", "--help").stdout


# -- commands ------------------------------------------------


def test_bench_keeps_failures_beside_results(tmp_path: Path) -> None:
    path, picture = tmp_path / "results.json", tmp_path / "plot.png"
    result = run(
        *("bench", "ernie-4.5-vl-28b-a3b", "--depth", "2", "--strategies", "eager,ordered,eager"),
        *("--experts", "opaque", "--compiler", "eager", "--json", path, "--plot", picture),
    )
    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    eager, ordered = written["results"]
    assert (eager["strategy"], eager["error"]) == ("eager", None)
    assert eager["cold_start_s"] > 0
    assert ordered["strategy"] == "ordered"
    assert ordered["error"].startswith("LayerOrderError: ")
    assert written["environment"]["torch"] == eager["torch"]
    assert "cold start" in result.stdout
    assert "failed: LayerOrderError" in result.stdout
    assert picture.stat().st_size > 10_000


def test_generate_streams_text_and_says_how_fast(folder: Path) -> None:
    result = run("generate", folder, "--prompt", PROMPT, "--max-new-tokens", "8", "--compiler", "eager")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(PROMPT)
    assert "first token after" in result.stdout
    assert "tokens/s (8 tokens)" in result.stdout
    one = run("generate", folder, "--prompt", PROMPT, "--max-new-tokens", "1", "--compiler", "eager")
    assert one.exit_code == 0, one.output
    assert "first token after" in one.stdout
    assert "tokens/s" not in one.stdout


def test_explain_shows_what_keeps_pieces_apart(folder: Path) -> None:
    hoisted = run("explain", "gpt-oss-120b", "--depth", "4", "--experts", "opaque")
    assert hoisted.exit_code == 0, hoisted.output
    assert "5 pieces, 3 distinct" in hoisted.stdout
    baked = run("explain", folder, "--identity", "baked", "--experts", "opaque")
    assert baked.exit_code == 0, baked.output
    assert "4 pieces, 4 distinct" in baked.stdout
    assert "model.layers.1.mlp.experts" in baked.stdout


def test_explain_prints_the_program() -> None:
    result = run("explain", "gpt-oss-120b", "--depth", "12", "--program")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("# How the model runs") and "\ndef run(" in result.stdout
    assert "in LAYERS_1_TO_10:" in result.stdout
