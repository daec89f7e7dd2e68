"""Helpers: forks that get ready during a trace and compile its pieces, which are carried to them."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import families
import glowplug
from glowplug.background.helper import Helper
from glowplug.background.job import Job, Say
from glowplug.errors import NotCarriableError
from glowplug.graph.capture import Captured, capture
from glowplug.graph.carried import carry, unpack
from glowplug.graph.fingerprint import fingerprint
from glowplug.program import compiling
from storing import PickleCompiler

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class HelpedCompiler(PickleCompiler):
    """Lets a helper store pieces.

    Args:
        log: a file that gets a line for each piece compiled, by whichever process.
        fault: what the helper does: `"raises"` or `"dies"` when it gets ready, or nothing.
    """

    name = "helped"

    def __init__(self, log: Path, fault: str = "") -> None:
        super().__init__(log)
        self.fault = fault
        self.helper: Helper | None = None
        self.cooled = 0

    def warm_up(self, device_type: str) -> None:
        self.helper = Helper(self._prepare)

    def _prepare(self) -> HelpedCompiler:
        if self.fault == "raises":
            raise RuntimeError("a helper that fails")
        if self.fault == "dies":
            os._exit(3)
        return self

    def hand_over(self, work: Callable[..., None], *arguments: Any) -> Job | None:
        assert self.helper is not None
        return self.helper.hand_over(work, *arguments)

    def cool_down(self) -> None:
        assert self.helper is not None
        self.cooled += 1
        self.helper.stop()


def compiled_by(log: Path) -> list[int]:
    """The process that compiled each piece."""
    return [int(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("cache_dir", ["off", None])
def test_a_helper_compiles_all_pieces(family: str, cache_dir: str | None, tmp_path: Path) -> None:
    eager, model = families.build(family), families.build(family)
    compiler = HelpedCompiler(tmp_path / "log")
    folder = cache_dir or tmp_path / "store"
    glowplug.compile(model, compiler=compiler, cache_dir=folder, experts="inline", inside="eager", strict=True)
    ids = families.prompt(2, 5)
    assert torch.equal(*(each.generate(ids, max_new_tokens=6, do_sample=False) for each in (eager, model)))
    report = glowplug.report(model)
    assert os.getpid() not in compiled_by(tmp_path / "log")
    assert len(compiled_by(tmp_path / "log")) == report.distinct_pieces == compiler.loaded
    assert report.compiled_pieces == report.distinct_pieces
    assert (compiler.compiled, compiler.cooled) == (0, 1)


@pytest.mark.parametrize("fault", ["raises", "dies"])
def test_without_its_helper_a_process_compiles_by_itself(fault: str, tmp_path: Path) -> None:
    eager, model = families.build("qwen3_moe"), families.build("qwen3_moe")
    compiler = HelpedCompiler(tmp_path / "log", fault)
    glowplug.compile(model, compiler=compiler, cache_dir="off", experts="inline", inside="eager", strict=True)
    ids = families.prompt(2, 5)
    assert torch.equal(*(each.generate(ids, max_new_tokens=6, do_sample=False) for each in (eager, model)))
    assert set(compiled_by(tmp_path / "log")) == {os.getpid()}


def test_pieces_that_cannot_be_carried_are_compiled_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(graphs: Sequence[fx.GraphModule]) -> bytes:
        raise NotCarriableError("no way")

    monkeypatch.setattr(compiling, "carry", refuse)
    model = families.build("qwen3_moe")
    compiler = HelpedCompiler(tmp_path / "log")
    glowplug.compile(model, compiler=compiler, cache_dir="off", experts="inline", inside="eager", strict=True)
    with caplog.at_level(logging.DEBUG, logger="glowplug"), torch.no_grad():
        model(families.prompt(2, 5))
    assert set(compiled_by(tmp_path / "log")) == {os.getpid()}
    assert "no way" in caplog.text


def test_a_helper_works_once_and_with_what_it_prepared() -> None:
    def work(say: Say, prepared: str, text: str) -> None:
        say(text=prepared + text)

    globals()["work"] = work
    work.__qualname__ = "work"
    helper = Helper(lambda: "pre")
    job = helper.hand_over(work, "pared")
    assert job is not None
    outcome = job.outcome(math.inf)
    assert outcome is not None and outcome.facts == {"text": "prepared"}
    assert helper.hand_over(work, "again") is None


def test_a_helper_that_cannot_take_work_is_no_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, or work that can't be pickled: the process does it by itself."""
    helper = Helper(lambda: None)
    assert helper.hand_over(lambda say, prepared: None) is None  # a lambda has no name to pickle
    assert helper._job.ended(time.monotonic() + 30.0)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("glowplug.background.helper.tempfile.TemporaryFile", full)
    helper = Helper(lambda: None)
    assert helper.hand_over(print) is None
    helper.stop()


def test_a_helper_that_nobody_needs_ends() -> None:
    ended = []
    for end in (Helper.stop, lambda helper: None):
        helper = Helper(lambda: None)
        process = helper._job._process
        assert process is not None
        end(helper)
        del helper
        ended.append(process)
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline and any(process.poll() is None for process in ended):
        time.sleep(0.01)
    assert all(process.poll() is not None for process in ended)


def carried(function: Callable[..., Any], *inputs: Tensor) -> tuple[Captured, fx.GraphModule, list[Any], list[Any]]:
    """A function's graph, and the same carried; and the guards on its sizes before, and there."""

    def consume(captured: Captured) -> tuple[Captured, fx.GraphModule, list[Any], list[Any]]:
        before = list(captured.fake_mode.shape_env.guards)
        mode, (graph,) = unpack(carry([captured.gm]))
        assert captured.fake_mode.shape_env.guards == before
        return captured, graph, before, list(mode.shape_env.guards)

    return capture(function, inputs, consume)


def marked(*shape: int) -> Tensor:
    """A tensor whose first two sizes vary."""
    tensor = torch.randn(shape)
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(tensor, dim)
    return tensor


def plain(x: Tensor, y: Tensor) -> Any:
    return (
        (x.view(-1, x.shape[-1]) * 2).chunk(2, dim=-1),
        x.transpose(1, 2) + y.transpose(1, 2),
        x.shape[0] * y.shape[1],
    )


def test_a_carried_graph_is_the_same() -> None:
    captured, graph, before, there = carried(plain, marked(3, 5, 8), marked(3, 5, 8))
    assert str(graph.graph) == str(captured.gm.graph)
    assert str(fingerprint(graph)) == str(fingerprint(captured.gm))
    assert [str(guard.expr) for guard in there] == [str(guard.expr) for guard in before]
    inputs = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
    originals = [node.meta["example_value"] for node in captured.gm.graph.nodes if node.op == "placeholder"]
    for value, original in zip(inputs, originals, strict=True):
        if isinstance(value, Tensor):
            assert list(map(str, value.shape)) == list(map(str, original.shape))
            assert list(map(str, value.stride())) == list(map(str, original.stride()))
            assert (value.dtype, value.device) == (original.dtype, original.device)


def refuses(function: Callable[..., Any], *inputs: Tensor) -> str:
    """Why a function's graph can't be carried."""
    with pytest.raises(NotCarriableError) as caught:
        carried(function, *inputs)
    return str(caught.value)


def test_what_cannot_be_carried_is_refused() -> None:
    base = torch.randn(4, 4)
    assert "two of its inputs share" in refuses(lambda x, y: x.add_(1) + y, base, base.view(16)[:4])
    assert "does not begin where its memory does" in refuses(lambda x: x + 1, base[1:])
    conjugate = torch.randn(4, dtype=torch.complex64).conj()
    assert "does not begin where its memory does" in refuses(lambda x: x + 1, conjugate)


def test_inputs_that_share_memory_may_be_carried_if_none_is_written_to() -> None:
    base = torch.randn(4, 4)
    _, graph, _, _ = carried(lambda x, y: x * 2 + y, base, base.view(16)[:4])
    assert len([node for node in graph.graph.nodes if node.op == "placeholder"]) == 2
