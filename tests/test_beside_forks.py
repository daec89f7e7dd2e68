"""What a start does while forks compile, as far as it needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import families
import glowplug
from glowplug.compilers import quick_tuning
from glowplug.errors import NotStampableError
from glowplug.frontends.hf import cases
from glowplug.frontends.hf.comparison import Comparison
from glowplug.frontends.hf.front import HfFrontEnd
from glowplug.graph.capture import capture, outside_trace
from glowplug.program import build
from glowplug.runtime.forks import fork_workers
from glowplug.verify import check
from glowplug.verify.slots import run_graph
from storing import Rounds


def test_a_model_runs_outside_of_the_trace() -> None:
    seen: list[bool] = []

    def consume(captured: Any) -> None:
        before = torch.compiler.is_compiling()
        with outside_trace():
            seen.append(torch.compiler.is_compiling())
        seen.append(torch.compiler.is_compiling() == before)

    def double(x: Tensor) -> Tensor:
        return 2 * x

    capture(double, (torch.ones(3),), consume)
    assert seen == [False, True]


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """As on a GPU, do what the comparison needs no compiled piece for while these are compiled. Yields how often the
    model's own forward ran in sequences of cases."""
    ran: list[int] = []
    own_compile, own_sequences = build.compile_pieces, cases.sequences

    def compile_pieces(*args: Any) -> Any:
        with outside_trace():
            args[-1]()
        return own_compile(*args)

    def rehearsal(self: HfFrontEnd, call: Any, registry: Any, *, check_order: bool) -> Any:
        self._rehearsal = Comparison(self, call, registry, self.returns(), check_order=check_order)
        return self._rehearsal.rehearse

    def sequences(*args: Any, **kwargs: Any) -> Any:
        ran.append(1)
        return own_sequences(*args, **kwargs)

    monkeypatch.setattr(HfFrontEnd, "rehearsal", rehearsal)
    monkeypatch.setattr(build, "compile_pieces", compile_pieces)
    monkeypatch.setattr(cases, "sequences", sequences)
    yield ran


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "glm4_moe"])
@pytest.mark.parametrize("given", [False, True])
def test_the_models_own_forward_runs_once_in_each_case(beside: list[int], family: str, given: bool) -> None:
    eager, model = families.build(family), families.build(family)
    glowplug.compile(model, compiler=Rounds(1e-6), cache_dir="off", strict=True)
    ids = families.prompt(2, 5)
    settings = {"position_ids": torch.arange(5).expand(2, -1)} if given else {}
    with torch.no_grad():
        torch.testing.assert_close(model(ids, **settings).logits, eager(ids, **settings).logits, rtol=1e-3, atol=1e-4)
    assert beside == [1]
    assert model.forward.front._rehearsal is None


@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe"])
def test_a_wrong_piece_is_found_by_what_was_run_before(beside: list[int], family: str) -> None:
    eager, model = families.build(family), families.build(family)
    glowplug.compile(model, compiler=Rounds(1e-2), stamp="off", cache_dir="off")
    ids = families.prompt(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, eager(ids).logits, rtol=0, atol=0)
    assert beside == [1]
    (fallback,) = glowplug.report(model).fallbacks
    assert "compiled.output[0] differs by 1.0e-02" in fallback.reason


def test_what_was_run_before_does_not_change_afterwards() -> None:
    """A later piece may write to what an earlier one returned or was given."""

    def adding(x: Tensor) -> tuple[Tensor]:
        return (x.add_(1),)

    given = torch.zeros(2)
    outputs, ran = run_graph(adding, [given])
    run = ran.kept()
    outputs[0].mul_(5)
    assert run.problem_of(adding) is None
    assert run.problem_of(adding) is None
    assert "output[0] differs" in str(run.problem_of(lambda x: (x.add_(1) + 1,)))
    assert "inputs afterwards[0] differs" in str(run.problem_of(lambda x: (x + 1,)))
    assert given.tolist() == [5.0, 5.0]
    assert run.nbytes == 3 * given.nbytes


def test_a_rehearsal_that_would_hold_too_much_is_done_without(
    beside: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_MOST_HELD", 1000)
    model = families.build("qwen3_moe")
    glowplug.compile(model, compiler=Rounds(1e-6), cache_dir="off", strict=True)
    with torch.no_grad():
        model(families.prompt(2, 5))
    assert beside == [1, 1]


@pytest.mark.parametrize("change", ["weights", "attribute"])
def test_a_model_that_changes_meanwhile_is_not_served_stale(
    beside: list[int], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    eager, model = families.build("qwen3_moe"), families.build("qwen3_moe")
    glowplug.compile(model, compiler=Rounds(1e-6), cache_dir="off")
    own = Comparison.rehearse

    def rehearse(self: Comparison, uncompiled: Any) -> None:
        own(self, uncompiled)
        with torch.no_grad():
            for each in (model, eager):
                if change == "weights":
                    each.lm_head.weight.mul_(2)
                else:
                    each.model.norm.variance_epsilon = 10.0

    monkeypatch.setattr(Comparison, "rehearse", rehearse)
    ids = families.prompt(2, 5)
    rounding = 0 if change == "attribute" else 1e-3
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, eager(ids).logits, rtol=rounding, atol=rounding / 10)
    assert glowplug.report(model).strategy == ("eager" if change == "attribute" else "hoisted")


def test_a_wrong_piece_whose_weights_changed_since_is_found() -> None:
    """Its graph with other rounding, which reads the weights of today, is no excuse."""
    weight = torch.nn.Parameter(torch.full((2,), 3.0), requires_grad=False)

    def scaling(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (x * weight,)

    _, run = run_graph(scaling, [torch.ones(2), weight])
    weight.mul_(2)
    assert run.problem_of(scaling) is None
    assert "output[0] differs by 1.0e-01" in str(run.problem_of(lambda x, weight: (1.1 * x * weight,)))


def test_a_rehearsal_serves_the_program_that_it_ran(beside: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A rung of the ladder that fails after its rehearsal leaves nothing to the next one."""
    own = build.compile_pieces
    failing = [True]

    def compile_pieces(*args: Any) -> Any:
        made = own(*args)
        if failing:
            failing.clear()
            raise NotStampableError("as a test wants it")
        return made

    monkeypatch.setattr(build, "compile_pieces", compile_pieces)
    eager, model = families.build("gpt_oss", layers=8), families.build("gpt_oss", layers=8)
    glowplug.compile(model, compiler=Rounds(1e-6), cache_dir="off")
    ids = families.prompt(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, eager(ids).logits, rtol=1e-3, atol=1e-4)
    assert glowplug.report(model).strategy == "hoisted"
    assert beside == [1, 1]


def test_workers_run_at_once_and_may_fail(tmp_path: Path) -> None:
    def write(name: str) -> None:
        (tmp_path / name).touch()

    def fail() -> None:
        raise RuntimeError("not seen")

    fork_workers([lambda: write("a"), fail, lambda: write("b")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_kernels_are_tuned_with_few_runs_only_in_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.benchmarking import benchmarker

    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(type(benchmarker), "benchmark_gpu", lambda self, run, **kwargs: calls.append(kwargs))
    with quick_tuning(), quick_tuning():
        benchmarker.benchmark_gpu(None, rep=40)
    benchmarker.benchmark_gpu(None, rep=40)
    assert calls == [{"memory_warmup_iters": 10, "benchmark_iters": 20, "rep": 40}, {"rep": 40}]
