"""Options: every wrong one is refused by name, and `fast_moe_cold_start` means what vLLM's switch means."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import families
import glowplug
from glowplug import Options, UsageError
from glowplug.compilers import EagerCompiler, InductorCompiler, get_compiler

WRONG = [
    ("identity", "Hoisted"),
    ("identity", "stamped"),
    ("identity", None),
    ("identity", 1),
    ("experts", "on"),
    ("experts", True),
    ("compiler", "aot_eager"),
    ("compiler", None),
    ("compiler", 3),
    ("compiler", object()),
    ("compiler", lambda piece, inputs: piece),
    ("fast_moe_cold_start", "yes"),
    ("fast_moe_cold_start", 1),
    ("fast_moe_cold_start", 0),
    ("strict", 1),
    ("strict", None),
    ("strict", "True"),
    ("verify", True),
    ("verify", "always"),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda item: str(item)[:20])
def test_wrong_option(name: str, value: Any) -> None:
    model = nn.Linear(2, 2).eval()
    with pytest.raises(UsageError) as caught:
        glowplug.compile(model, **{name: value})
    assert name in str(caught.value)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(UsageError):
        glowplug.report(model)  # nothing was attached
    assert "forward" not in model.__dict__


def test_unknown_option() -> None:
    with pytest.raises(TypeError, match="speed"):
        glowplug.compile(nn.Linear(2, 2), speed="warp")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "thing", [lambda x: x, nn.Linear, torch.ones(2), None, "model"], ids=lambda t: type(t).__name__
)
def test_only_modules_compile(thing: Any) -> None:
    with pytest.raises(UsageError, match=r"takes an nn\.Module") as caught:
        glowplug.compile(thing)
    assert type(thing).__name__ in str(caught.value)


def test_report_of_what_was_not_compiled() -> None:
    for thing in (nn.Linear(2, 2), families.build("qwen3", layers=1)):
        with pytest.raises(UsageError, match=r"glowplug\.compile\(model\) first"):
            glowplug.report(thing)
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    glowplug.compile(model, compiler="eager")
    with pytest.raises(UsageError):
        glowplug.report(model[0])


@pytest.mark.parametrize(
    ("switch", "identity", "meaning"),
    [
        (None, "auto", "hoisted"),
        (True, "auto", "ordered"),
        (False, "auto", "baked"),
        (None, "hoisted", "hoisted"),
        (None, "ordered", "ordered"),
        (None, "baked", "baked"),
        (True, "ordered", "ordered"),
        (False, "baked", "baked"),
    ],
)
def test_fast_moe_cold_start(switch: bool | None, identity: Any, meaning: str) -> None:
    assert Options(fast_moe_cold_start=switch, identity=identity).resolved_identity == meaning


@pytest.mark.parametrize(
    ("switch", "identity"), [(True, "hoisted"), (True, "baked"), (False, "hoisted"), (False, "ordered")]
)
def test_fast_moe_cold_start_contradicted(switch: bool, identity: Any) -> None:
    with pytest.raises(UsageError) as caught:
        glowplug.compile(nn.Linear(2, 2), fast_moe_cold_start=switch, identity=identity)
    assert f"fast_moe_cold_start={switch}" in str(caught.value)
    assert repr(identity) in str(caught.value)


@pytest.mark.parametrize(("switch", "strategy"), [(None, "hoisted"), (True, "ordered"), (False, "baked")])
def test_the_switch_reaches_the_model(switch: bool | None, strategy: str) -> None:
    model = families.build("mixtral", layers=2)
    glowplug.compile(model, compiler="eager", experts="opaque", fast_moe_cold_start=switch)
    with torch.no_grad():
        model(families.prompt())
    assert glowplug.report(model).strategy == strategy


def test_options_are_frozen_and_keyword_only() -> None:
    options = Options()
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.strict = True  # type: ignore[misc]
    with pytest.raises(TypeError):
        Options("hoisted")  # type: ignore[misc]
    assert options == Options()


def test_compilers_by_name_and_by_object() -> None:
    assert isinstance(get_compiler("inductor"), InductorCompiler)
    assert isinstance(get_compiler("eager"), EagerCompiler)
    mine = EagerCompiler()
    assert get_compiler(mine) is mine


def test_the_model_itself_is_returned() -> None:
    for model in (nn.Linear(2, 2).eval(), families.build("qwen3", layers=1)):
        assert glowplug.compile(model, compiler="eager") is model


def test_the_report_before_and_after_a_call() -> None:
    model = families.build("glm4_moe")
    glowplug.compile(model, compiler="eager")
    before = glowplug.report(model).as_dict()
    assert (before["pieces"], before["programs"], before["fallbacks"]) == (0, 0, [])
    with torch.no_grad():
        model(families.prompt())
    report = glowplug.report(model)
    after = report.as_dict()
    assert after["compiler"] == "eager"
    assert after["experts"] == "inline"
    assert after["programs"] == 1
    assert after["pieces"] >= after["distinct_pieces"] > 1
    assert after["phases"]["trace"] > 0
    assert after["phases"]["verify"] > 0
    assert "hoisted" in str(report)
    assert str(after["distinct_pieces"]) in str(report)


def test_verify_off_verifies_nothing() -> None:
    model = families.build("mixtral", layers=2)
    glowplug.compile(model, compiler="eager", verify="off")
    with torch.no_grad():
        model(families.prompt())
    report = glowplug.report(model)
    assert report.phases["verify"] == 0
    assert report.strategy == "hoisted"


class Wrong(EagerCompiler):
    """A compiler whose pieces are wrong by a factor."""

    name = "wrong"

    def compile(self, piece: Any, inputs: Any) -> Any:
        run = super().compile(piece, inputs)
        return lambda *arguments: [value * 1.5 if value.is_floating_point() else value for value in run(*arguments)]


class Broken(EagerCompiler):
    """A compiler that fails."""

    name = "broken"

    def compile(self, piece: Any, inputs: Any) -> Any:
        raise RuntimeError("no such instruction\nand so on")


@pytest.mark.parametrize("compiler", [Wrong(), Broken()], ids=lambda c: c.name)
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3"])
def test_a_compiler_at_fault_costs_speed_and_nothing_else(compiler: Any, family: str) -> None:
    model, ids = families.build(family), families.prompt(2, 9)
    with torch.no_grad():
        expected = model(ids).logits
        glowplug.compile(model, compiler=compiler)
        assert torch.equal(model(ids).logits, expected)
    report = glowplug.report(model)
    assert report.strategy == "eager"
    (fallback,) = report.fallbacks
    assert ("differs from eager" if compiler.name == "wrong" else "no such instruction") in fallback.reason
    glowplug.compile(model, compiler=compiler, strict=True)
    with torch.no_grad(), pytest.raises(glowplug.GlowplugError):
        model(ids)


def test_the_report_is_saved_with_the_program(tmp_path: Path) -> None:
    model = glowplug.compile(families.build("gpt_oss", layers=10), compiler="eager")
    with torch.no_grad():
        model(families.prompt(1, 3))
    folder = glowplug.report(model).save(tmp_path / "new" / "report")
    saved = json.loads((folder / "report.json").read_text())
    assert (saved["strategy"], saved["pieces"]) == ("stamped", 11)
    text = (folder / "program.py").read_text()
    compile(text, "program.py", "exec")
    assert "for " in text and "# piece_a: " in text and "rows of " in text
    (tmp_path / "file").write_text("")
    with pytest.raises(glowplug.UsageError, match="can't write the report"):
        glowplug.report(model).save(tmp_path / "file")
