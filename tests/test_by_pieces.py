"""Each compiled piece is compared with its own graph, on the same inputs: what rounding makes of a program as a whole
is no reason not to use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import families
import glowplug
from glowplug.bench.presets import build_model
from glowplug.graph.fingerprint import Fingerprint
from glowplug.ops.layer_op import layer_op
from glowplug.ops.tape import Tape
from glowplug.program import Program
from glowplug.verify import check
from glowplug.verify.check import Case, why_wrong
from glowplug.verify.closeness import COMPILED, EXACT, Tolerance, difference, distance
from glowplug.verify.slots import run_both
from storing import Rounds
from test_changes import eager, quiet


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are graphs, nothing depends on how far a whole compiled program may be from eager."""
    monkeypatch.setattr(check, "END_TO_END", Tolerance(0, 0, 0, 0))


@pytest.mark.parametrize("stamp", ["auto", "off"])
def test_rounding_is_no_reason_to_run_eager(stamp: str) -> None:
    model = glowplug.compile(families.build("glm4_moe", layers=8), compiler=Rounds(1e-6), stamp=stamp)
    torch.testing.assert_close(quiet(model), eager(model), rtol=1e-2, atol=1e-3)
    report = glowplug.report(model)
    assert (report.fallbacks, report.strategy) == ([], "stamped" if stamp == "auto" else "hoisted")
    assert not torch.equal(quiet(model), eager(model))


def test_a_piece_that_is_wrong_is_found() -> None:
    model = glowplug.compile(families.build("glm4_moe", layers=8), compiler=Rounds(1e-2))
    assert torch.equal(quiet(model), eager(model))
    report = glowplug.report(model)
    assert report.strategy == "eager"
    assert all("compiled.output[0] differs by 1.0e-02" in fallback.reason for fallback in report.fallbacks)


def test_a_program_from_the_store_is_asked_by_its_stored_graphs(tmp_path: Path) -> None:
    for start in ("cold", "warm"):
        model = families.build("gpt_oss", layers=8)
        compiler = Rounds(1e-6)
        glowplug.compile(model, compiler=compiler, cache_dir=tmp_path / "store", ends="compiled")
        torch.testing.assert_close(quiet(model), eager(model), rtol=1e-2, atol=1e-3)
        report = glowplug.report(model)
        assert (report.start, report.strategy, report.fallbacks) == (start, "stamped", [])
        assert bool(compiler.compiled) == (start == "cold")
        assert report.store is not None and report.store.problems == ()


def test_a_stored_program_with_a_wrong_piece_is_made_anew(tmp_path: Path) -> None:
    """Its compiler has become another one, that makes the stored pieces do something else."""
    for error in (1e-6, 1e-2):
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


def program(piece: Any) -> Program:
    """A program of one piece."""
    return Program(lambda slots, x: slots[0](x), {Fingerprint("a piece"): piece}, ("x",), "")


def test_what_ops_make_of_rounding_is_not_held_against_a_piece() -> None:
    root = nn.Sequential(nn.Identity())
    registry = glowplug.register_layers(root)
    handle: Any = root[0]._glowplug_handle
    ask = torch.ops.test_by_pieces.choose.hoisted

    def plain(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (3 * ask(handle, x),)

    def rounding(x: torch.Tensor) -> list[torch.Tensor]:
        return [3 * ask(handle, x - 2e-9)]

    def handing_over_something_else(x: torch.Tensor) -> list[torch.Tensor]:
        return [3 * ask(handle, -x)]

    def calling_twice(x: torch.Tensor) -> list[torch.Tensor]:
        return [1.5 * (ask(handle, x) + ask(handle, x))]

    def never_calling(x: torch.Tensor) -> list[torch.Tensor]:
        return [torch.where(x > 0, 3.0, -3.0)]

    inputs, expected = torch.tensor([2.0, -1e-9, 1e-9]), torch.tensor([3.0, -3.0, 3.0])
    assert rounding(torch.tensor([1e-9]))[0].item() == -3.0
    case = Case("three numbers", (expected,), lambda made: made.run(inputs))
    graphs = program(plain)
    for compiled, said in (
        (rounding, None),
        (handing_over_something_else, "compiled.ops get.test_by_pieces::choose of 0[0][0] differs by"),
        (calling_twice, "more often"),
        (never_calling, "compiled.ops get has other keys"),
    ):
        problem = why_wrong(program(compiled), graphs, [case])
        assert problem is None if said is None else problem is not None and said in problem
    assert list(graphs.slots.values()) == [plain]
    assert len(registry) == 1


def test_an_op_that_writes_does_so_once() -> None:
    root = nn.Sequential(nn.Identity())
    registry = glowplug.register_layers(root)
    layer: Any = root[0]
    layer.calls = 0
    tape, seen = Tape(), torch.zeros(3)
    with tape.recording():
        torch.ops.test_by_pieces.count.hoisted(layer._glowplug_handle, seen)
    for _ in range(2):
        again = torch.zeros(3)
        with tape.replaying() as given:
            torch.ops.test_by_pieces.count.hoisted(layer._glowplug_handle, again)
        assert difference(given, tape.given, EXACT, "it") is None
        assert (layer.calls, seen.tolist(), again.tolist()) == (1, [1.0] * 3, [1.0] * 3)
    assert len(registry) == 1


def test_what_a_piece_writes_is_compared() -> None:
    def adding(amount: float) -> Callable[[torch.Tensor], tuple[torch.Tensor]]:
        return lambda x: (x.add_(amount).sum(),)

    def hiding(x: torch.Tensor) -> tuple[torch.Tensor]:
        return ((x + 1).sum(),)

    for compiled, said in ((adding(1), None), (hiding, "inputs afterwards[0] differs"), (adding(2), "output[0]")):
        seen = torch.zeros(2, 3)[:, ::2]
        outputs, problem = run_both(adding(1), compiled, [seen])
        assert (outputs[0].item(), seen.tolist()) == (4.0, [[1.0, 1.0], [1.0, 1.0]])
        assert problem is None if said is None else problem is not None and said in problem


def test_compiled_code_gets_inputs_of_the_same_strides() -> None:
    strides = []

    def noting(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        strides.append([tensor.stride() for tensor in tensors])
        return tensors

    whole = torch.randn(4, 6)
    run_both(noting, noting, [whole[:, 1:3], whole.t(), whole[:1].expand(4, 6), whole[:0]])
    assert strides[0] == strides[1]


def test_a_decision_that_rounding_turns_is_no_fault() -> None:
    """A router that is given two experts nearly tied, inside a piece or in front of an op."""
    weights = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights[1] = weights[0]
    weights[1, 0] *= 1.01
    x = (weights[0] + 0.1 * weights[2]).unsqueeze(0)
    table = torch.randn(8, 16).bfloat16()

    def routing(precise: bool, wrong: bool = False) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            scores = x.float() @ weights.float().t() if precise else (x @ weights.t()).float()
            chosen = scores.topk(2).indices.flip(-1) if wrong else scores.topk(2).indices
            return chosen, table[chosen[:, 0]]

        return run

    near = [run_both(routing(False), routing(True), [x * (1 + 0.01 * step)])[1] for step in range(20)]
    assert near == [None] * 20
    weights[1] *= 0.5
    assert "output[0] differs in 2 of 2 values" in str(run_both(routing(False), routing(False, wrong=True), [x])[1])


@pytest.mark.inductor
def test_a_deep_model_in_half_precision() -> None:
    """Its routers decide between experts that are nearly tied, one way compiled, another uncompiled."""
    model = build_model("glm-4.7", depth=92, dtype=torch.bfloat16)
    glowplug.compile(model, experts="opaque", ends="compiled", cache_dir="off")
    with torch.no_grad():
        model(torch.arange(6).view(1, 6))
    report = glowplug.report(model)
    assert (report.strategy, report.fallbacks) == ("stamped", [])


def test_what_outputs_may_differ_by() -> None:
    ones, whole, far = torch.ones(4), torch.arange(3), torch.tensor([1.0, float("-inf"), -3e38])
    for actual, expected in (
        ([ones, whole], [ones * (1 + 1e-6), whole]),
        ([ones.bfloat16()], [ones.bfloat16() * (1 + 2**-7)]),
        ([far], [far.clone()]),
        ([torch.complex(ones, ones)], [torch.complex(ones, ones * (1 + 1e-6))]),
        ({"a": (1, "b", ones)}, {"a": (1, "b", ones.clone())}),
    ):
        assert difference(actual, expected, COMPILED, "it") is None
    for actual, expected in (
        ([ones], [ones * 1.001]),
        ([ones.bfloat16()], [ones.bfloat16() * 1.2]),
        ([ones[:2]], [ones]),
        ([whole], [whole + 1]),
        ([ones], [ones, ones]),
        ([ones], [1.0]),
        ([ones * float("nan")], [ones]),
        ([far], [torch.tensor([1.1, float("-inf"), 3e38])]),
        ([torch.complex(ones, ones)], [torch.complex(ones, -ones)]),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, {"a": 2}),
    ):
        assert difference(actual, expected, COMPILED, "it") is not None
    assert distance(ones * 3, ones) == 2.0
