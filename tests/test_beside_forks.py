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
from glowplug.frontends.hf import cases
from glowplug.frontends.hf.front import HfFrontEnd
from glowplug.graph.capture import capture, outside_trace
from glowplug.runtime.forks import fork_workers


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
    """As on a GPU, run the model's own forward before the comparison. Yields how often it ran in sequences of cases."""
    ran: list[int] = []
    own_target, own_sequences = HfFrontEnd.target, cases.sequences

    def target(self: HfFrontEnd, call: Any, *args: Any) -> Any:
        made = own_target(self, call, *args)
        self._run_own(call)
        return made

    def sequences(*args: Any, **kwargs: Any) -> Any:
        ran.append(1)
        return own_sequences(*args, **kwargs)

    monkeypatch.setattr(HfFrontEnd, "target", target)
    monkeypatch.setattr(cases, "sequences", sequences)
    yield ran


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "glm4_moe"])
@pytest.mark.parametrize("given", [False, True])
def test_the_models_own_forward_runs_once_in_each_case(beside: list[int], family: str, given: bool) -> None:
    eager, model = families.build(family), families.build(family)
    glowplug.compile(model, compiler="eager", strict=True)
    ids = families.prompt(2, 5)
    settings = {"position_ids": torch.arange(5).expand(2, -1)} if given else {}
    with torch.no_grad():
        torch.testing.assert_close(model(ids, **settings).logits, eager(ids, **settings).logits)
    assert beside == [1]
    assert not model.forward.front._own_steps


def test_a_model_that_changes_meanwhile_is_not_served(beside: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    eager, model = families.build("qwen3_moe"), families.build("qwen3_moe")
    glowplug.compile(model, compiler="eager")
    own = HfFrontEnd._run_own

    def run(self: HfFrontEnd, call: Any) -> None:
        own(self, call)
        with torch.no_grad():
            for weights in (self.model.lm_head.weight, eager.lm_head.weight):
                weights.mul_(2)

    monkeypatch.setattr(HfFrontEnd, "_run_own", run)
    ids = families.prompt(2, 5)
    with torch.no_grad():
        outputs = model(ids).logits
        torch.testing.assert_close(outputs, eager(ids).logits)


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
