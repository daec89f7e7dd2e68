"""A program whose logits are far from eager's is asked piece by piece whether that is rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import families
import glowplug
from glowplug.bench.presets import build_model
from glowplug.graph.fingerprint import Fingerprint
from glowplug.hf import verify
from glowplug.ops.layer_op import layer_op
from glowplug.ops.tape import Tape
from glowplug.program import Program, try_pieces
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


@layer_op("test_by_pieces::choose", fake=torch.empty_like)
def choose(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a router does with scores that are nearly tied."""
    return torch.where(x > 0, 1.0, -1.0)


@layer_op("test_by_pieces::count", fake=lambda seen: None, mutates=("seen",))
def count(layer: Any, seen: torch.Tensor) -> None:
    """An op that writes."""
    layer.calls += 1
    seen.add_(1)


def tried(compiled: Callable[[Any, torch.Tensor], torch.Tensor], layer: nn.Module) -> tuple[torch.Tensor, str | None]:
    """Compare a piece with `plain`."""

    def program(piece: Any) -> Program:
        return Program(lambda slots, x: slots[0](x), {Fingerprint("a piece"): piece}, ("x",), "")

    def plain(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (3 * torch.ops.test_by_pieces.choose.hoisted(layer._glowplug_handle, x),)

    uncompiled = program(plain)
    inputs = torch.tensor([2.0, -1e-9, 1e-9])
    made = program(lambda x: (compiled(layer, x),))
    result, problem = try_pieces(made, uncompiled, lambda paired: paired.run(inputs))
    assert list(uncompiled.slots.values()) == [plain]
    return result[0], problem


def test_what_ops_make_of_rounding_is_not_held_against_a_piece() -> None:
    root = nn.Sequential(nn.Identity())
    registry = glowplug.register_layers(root)
    ask = torch.ops.test_by_pieces.choose.hoisted

    def rounding(layer: Any, x: torch.Tensor) -> torch.Tensor:
        return 3 * ask(layer._glowplug_handle, x - 2e-9)

    def handing_over_something_else(layer: Any, x: torch.Tensor) -> torch.Tensor:
        return 3 * ask(layer._glowplug_handle, -x)

    def calling_twice(layer: Any, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * (ask(layer._glowplug_handle, x) + ask(layer._glowplug_handle, x))

    def never_calling(layer: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, 3.0, -3.0)

    expected = [3.0, -3.0, 3.0]
    assert rounding(root[0], torch.tensor([1e-9])).item() == -3.0
    for compiled, said in (
        (rounding, None),
        (handing_over_something_else, "in what it hands to test_by_pieces::choose"),
        (calling_twice, "more often"),
        (never_calling, "fewer calls"),
    ):
        output, problem = tried(compiled, root[0])
        assert output.tolist() == expected
        assert problem is None if said is None else problem is not None and said in problem
    assert len(registry) == 1


def test_an_op_that_writes_does_so_once() -> None:
    root = nn.Sequential(nn.Identity())
    registry = glowplug.register_layers(root)
    layer: Any = root[0]
    layer.calls = 0
    tape, seen = Tape(why_different), torch.zeros(3)
    with tape.recording():
        torch.ops.test_by_pieces.count.hoisted(layer._glowplug_handle, seen)
    again = torch.zeros(3)
    with tape.replaying():
        torch.ops.test_by_pieces.count.hoisted(layer._glowplug_handle, again)
    assert (layer.calls, seen.tolist(), again.tolist(), tape.problem) == (1, [1.0] * 3, [1.0] * 3, None)
    assert len(registry) == 1


@pytest.mark.inductor
def test_a_deep_model_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its routers decide between experts that are nearly tied, one way compiled, another uncompiled."""
    monkeypatch.setattr(verify, "_TOLERANCE", {torch.bfloat16: 1e-3})
    model = build_model("glm-4.7", depth=92, dtype=torch.bfloat16)
    glowplug.compile(model, experts="opaque", ends="compiled", cache_dir="off")
    with torch.no_grad():
        model(torch.arange(6).view(1, 6))
    report = glowplug.report(model)
    assert (report.strategy, report.fallbacks) == ("stamped", [])


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
