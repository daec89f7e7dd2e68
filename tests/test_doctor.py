"""`glowplug doctor`: what it finds, what it takes for a problem, and its exit code."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from glowplug.cli import app
from glowplug.cli.doctor import compiling, machine, plug_in


def examine(*options: str) -> tuple[int, dict[tuple[str, str], dict[str, str]]]:
    """The exit code, and the findings by section and name."""
    result = CliRunner().invoke(app, ["doctor", "--json", *options])
    answer = json.loads(result.stdout)
    assert answer["ok"] == (result.exit_code == 0)
    assert result.stderr == ""
    return result.exit_code, {(finding["section"], finding["name"]): finding for finding in answer["findings"]}


@pytest.fixture(autouse=True)
def own_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A store of the test's own."""
    monkeypatch.setenv("GLOWPLUG_CACHE", str(tmp_path / "store"))
    return tmp_path / "store"


def test_all_is_well(own_store: Path) -> None:
    code, found = examine("--no-trial")
    assert code == 0
    assert found["versions", "torch"]["text"] == torch.__version__
    assert found["store", "place"]["text"] == str(own_store.resolve())
    assert found["store", "writable"]["state"] == "ok"
    assert found["store", "size"]["text"].startswith("0 artifacts")
    assert found["environment", "GLOWPLUG_CACHE"]["text"].startswith(str(own_store))
    assert found["eager", "models on cpu"]["text"].startswith("no call")


@pytest.mark.inductor
def test_a_trial_goes_through_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    code, found = examine()
    assert code == 0
    assert "compiled and ran" in found["compiler", "inductor on cpu"]["text"]
    assert compiling.Probe().constant != compiling.Probe().constant


def test_a_trial_that_fails_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the compiler says no")

    monkeypatch.setattr(compiling, "compile_model", fail)
    code, found = examine()
    assert code == 1
    finding = found["compiler", "inductor on cpu"]
    assert (finding["state"], "says no" in finding["text"]) == ("problem", True)
    assert "says no" in found["eager", "models on cpu"]["text"]


def test_torch_compile_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    code, found = examine()
    assert code == 1
    assert "unset it" in found["compiler", "inductor on cpu"]["text"]
    assert found["eager", "models on cpu"]["text"].startswith("all calls: TORCHDYNAMO_DISABLE=1")


def test_stores_that_do_not_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLOWPLUG_CACHE", "off")
    code, found = examine("--no-trial")
    assert (code, found["store", "place"]["state"]) == (0, "note")
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("GLOWPLUG_CACHE", str(shared))
    code, found = examine("--no-trial")
    assert code == 1, "glowplug.compile raises where a store that was asked for is refused"
    assert "can be written to by others" in found["store", "place"]["text"]
    monkeypatch.setenv("GLOWPLUG_CACHE", "/proc/no-store")
    code, found = examine("--no-trial")
    assert (code, found["store", "writable"]["state"]) == (0, "warning")


def test_the_users_own_store_is_unsafe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.delenv("GLOWPLUG_CACHE")
    monkeypatch.setattr("glowplug.store.opening.default_root", lambda: shared)
    code, found = examine("--no-trial")
    assert (code, found["store", "place"]["state"]) == (0, "warning")
    assert "every start is cold" in found["store", "place"]["text"]


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOWPLUG_SIGNING_KEY", "secret" * 8)
    monkeypatch.setenv("GLOWPLUG_CACHE", "nowhere://me:password@host/store")
    result = CliRunner().invoke(app, ["doctor", "--no-trial"])
    assert result.exit_code == 1
    assert "nowhere://host/store" in result.stdout
    assert "secret" not in result.stdout
    assert "password" not in result.stdout


def test_an_ignored_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOWPLUG_BUILD_TIMEOUT", "soon")
    code, found = examine("--no-trial")
    assert (code, found["environment", "GLOWPLUG_BUILD_TIMEOUT"]["state"]) == (0, "warning")


@pytest.mark.parametrize(
    ("installed", "state"), [("5.17.0", "ok"), ("5.23.0.dev0", "ok"), ("5.16.3", "problem"), (None, "note")]
)
def test_versions_of_transformers(installed: str | None, state: str) -> None:
    assert machine._transformers(installed).state == state


@pytest.mark.parametrize(
    ("settings", "entry_point", "state", "words"),
    [
        ({}, True, "ok", "on"),
        ({}, False, "warning", "not installed"),
        ({"GLOWPLUG_VLLM": "off"}, True, "note", "switched off by GLOWPLUG_VLLM=off"),
        ({"VLLM_PLUGINS": "other"}, True, "note", "does not name it"),
        ({"VLLM_PLUGINS": "other,glowplug"}, True, "ok", "on"),
        ({"VLLM_DISABLE_COMPILE_CACHE": "1"}, True, "note", "every start is cold"),
    ],
)
def test_the_plug_in(
    settings: dict[str, str], entry_point: bool, state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GLOWPLUG_VLLM", "VLLM_PLUGINS", "VLLM_DISABLE_COMPILE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(plug_in, "version", lambda *packages: "0.24.0")
    points = SimpleNamespace(entry_points=lambda **_: ["glowplug"] if entry_point else [])
    monkeypatch.setattr(plug_in.importlib, "metadata", points)
    checked, plugged = plug_in.plug_in()
    assert checked.state == "ok"
    assert plugged.state == state
    assert words in plugged.text


def test_an_unchecked_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plug_in, "version", lambda *packages: "0.99.0")
    assert next(plug_in.plug_in()).state == "note"
    monkeypatch.setattr(plug_in, "version", lambda *packages: None)
    assert [finding.text for finding in plug_in.plug_in()] == ["not installed"]


def test_a_version_is_read_without_an_import() -> None:
    assert machine.version("no-such-package", "torch") == importlib.metadata.version("torch")
    assert machine.numbers("5.17.0.dev0+cpu") == (5, 17)


def test_without_transformers_the_doctor_still_comes(tmp_path: Path) -> None:
    program = "import sys; sys.modules['transformers'] = None\nfrom glowplug.cli import main; main()"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))

    examined = run("doctor", "--no-trial")
    assert examined.returncode == 0, examined.stderr
    refused = run("bench", "glm-4.7")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert "glowplug[hf]" in refused.stderr
