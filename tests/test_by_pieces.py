"""A program whose logits are far from eager's is asked piece by piece whether that is rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import families
import glowplug
from glowplug.hf import verify
from glowplug.program.paired import why_different
from storing import PickleCompiler
from test_changes import eager, quiet


class Rounds(PickleCompiler):
    """Compiled pieces give a little more than uncompiled ones.

    Args:
        error: how much, relatively.
    """

    name = "rounds"

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        return self._rounding(super().compile(piece, inputs))

    def load(self, artifact: bytes) -> Callable[..., Sequence[Any]]:
        return self._rounding(super().load(artifact))

    def _rounding(self, run: Callable[..., Sequence[Any]]) -> Callable[..., Sequence[Any]]:
        def rounding(*args: Any) -> Sequence[Any]:
            return tuple(value * (1 + self.error) if value.is_floating_point() else value for value in run(*args))

        return rounding


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any rounding is beyond the tolerance, as in a deep model of half precision."""
    monkeypatch.setattr(verify, "_TOLERANCE", {torch.float32: 1e-7})


@pytest.mark.parametrize("stamp", ["auto", "off"])
def test_rounding_is_no_reason_to_run_eager(stamp: str) -> None:
    model = glowplug.compile(families.build("glm4_moe", layers=8), compiler=Rounds(1e-5), stamp=stamp)
    torch.testing.assert_close(quiet(model), eager(model), rtol=1e-2, atol=1e-3)
    report = glowplug.report(model)
    assert (report.fallbacks, report.strategy) == ([], "stamped" if stamp == "auto" else "hoisted")
    assert not torch.equal(quiet(model), eager(model))


def test_a_piece_that_is_wrong_is_found() -> None:
    model = glowplug.compile(families.build("glm4_moe", layers=8), compiler=Rounds(1e-2))
    assert torch.equal(quiet(model), eager(model))
    report = glowplug.report(model)
    assert report.strategy == "eager"
    assert all("compiled it differs by 1.0e-02" in fallback.reason for fallback in report.fallbacks)


def test_a_program_from_the_store_is_asked_by_its_stored_graphs(tmp_path: Path) -> None:
    for start in ("cold", "warm"):
        model = families.build("gpt_oss", layers=8)
        compiler = Rounds(1e-5)
        glowplug.compile(model, compiler=compiler, cache_dir=tmp_path / "store", ends="compiled")
        torch.testing.assert_close(quiet(model), eager(model), rtol=1e-2, atol=1e-3)
        report = glowplug.report(model)
        assert (report.start, report.strategy, report.fallbacks) == (start, "stamped", [])
        assert bool(compiler.compiled) == (start == "cold")
        assert report.store is not None and report.store.problems == ()


def test_a_stored_program_with_a_wrong_piece_is_made_anew(tmp_path: Path) -> None:
    """Its compiler has become another one, that makes the stored pieces do something else."""
    for error in (1e-5, 1e-2):
        model = families.build("gpt_oss", layers=8)
        glowplug.compile(model, compiler=Rounds(error), cache_dir=tmp_path / "store", ends="compiled")
        torch.testing.assert_close(quiet(model), eager(model), rtol=1e-2, atol=1e-3)
    report = glowplug.report(model)
    assert report.strategy == "eager"
    assert report.store is not None and "is not equal to eager" in report.store.problems[0]


def test_what_outputs_may_differ_by() -> None:
    ones, whole = torch.ones(4), torch.arange(3)
    assert why_different([ones, whole], [ones * (1 + 1e-5), whole]) is None
    assert why_different([ones.bfloat16()], [ones.bfloat16() * 1.02]) is None
    for actual, expected in (
        ([ones], [ones * 1.001]),
        ([ones.bfloat16()], [ones.bfloat16() * 1.2]),
        ([ones[:2]], [ones]),
        ([whole], [whole + 1]),
        ([ones], [ones, ones]),
        ([ones * float("nan")], [ones]),
    ):
        assert why_different(actual, expected) is not None
