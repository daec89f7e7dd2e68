"""Helpers: forks that get ready during a trace and compile its pieces, which are carried to them."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import families
import glowplug
from glowplug import start
from glowplug.background.helper import Helper
from glowplug.background.job import Job, Say
from glowplug.errors import CaptureError, CompileError, NotCarriableError
from glowplug.graph.capture import Captured, capture
from glowplug.graph.carried import carry, unpack
from glowplug.graph.fingerprint import Fingerprint, fingerprint
from glowplug.graph.shapes import symbolic_sizes
from glowplug.layers.stack import choose_preview
from glowplug.program import build, handing_over
from storing import PickleCompiler

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class HelpedCompiler(PickleCompiler):
    """Lets a helper store pieces.

    Args:
        log: a file that gets a line for each piece compiled, by whichever process.
        fault: what the helper does: `"raises"` or `"dies"` when it gets ready, or nothing.
        ahead: whether it may compile pieces before the template is traced.
    """

    name = "helped"

    def __init__(self, log: Path, fault: str = "", *, ahead: bool = False) -> None:
        super().__init__(log)
        self.ahead = ahead
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

    @property
    def can_hand_over(self) -> bool:
        return self.ahead and self.helper is not None and self.helper.waits

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

    monkeypatch.setattr(handing_over, "carry", refuse)
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


@pytest.mark.parametrize(
    ("kinds", "layers"),
    [
        ([0] * 4, (0, 3)),
        ([0, 1] * 3, (0, 1, 5)),
        ([0, 0, 0, 1, 1, 1], (0, 3, 5)),
        ([0, 1, 0, 2] * 3, (0, 1, 3, 11)),
        ([0, 1, 1, 1], None),
        ([0, 0, 0], None),
        (list(range(6)), None),
    ],
)
def test_the_layers_that_are_traced_first(kinds: list[int], layers: tuple[int, ...] | None) -> None:
    assert choose_preview(kinds) == layers


class Steps:
    """Notes, in order, what captures and helpers do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.noted: list[str] = []
        self.pieces: set[Fingerprint] = set()
        own_ahead, own_build = build.compile_ahead, start.build_program

        def ahead(pieces: Any, *args: Any) -> None:
            self.noted.append("ahead")
            self.pieces |= set(pieces)
            own_ahead(pieces, *args)

        def build_program(*args: Any, **kwargs: Any) -> Any:
            self.noted.append("program")
            return own_build(*args, **kwargs)

        monkeypatch.setattr(build, "compile_ahead", ahead)
        monkeypatch.setattr(start, "build_program", build_program)


def helped(family: str, log: Path, **options: Any) -> tuple[Any, Any, HelpedCompiler]:
    """A deep model, the same compiled with a helper that may compile ahead, and the compiler."""
    eager, model = families.build(family, layers=24), families.build(family, layers=24)
    compiler = HelpedCompiler(log, ahead=True)
    glowplug.compile(model, compiler=compiler, cache_dir="off", experts="inline", inside="eager", **options)
    return eager, model, compiler


def same_tokens(eager: Any, model: Any) -> bool:
    ids = families.prompt(2, 5)
    return torch.equal(*(each.generate(ids, max_new_tokens=6, do_sample=False) for each in (eager, model)))


@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe", "qwen3_moe", "mixtral"])
def test_pieces_are_compiled_while_the_template_is_traced(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    eager, model, compiler = helped(family, tmp_path / "log", strict=True)
    assert same_tokens(eager, model)
    report = glowplug.report(model)
    assert steps.noted == ["ahead", "program"]
    assert report.strategy == "stamped"
    assert len(steps.pieces) == len(compiled_by(tmp_path / "log")) == report.distinct_pieces == report.compiled_pieces
    assert os.getpid() not in compiled_by(tmp_path / "log")
    assert compiler.loaded == report.distinct_pieces


def test_each_piece_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that has some pieces gives them, and the helper compiles the others."""
    steps = Steps(monkeypatch)
    for missing in (3, 1):
        model = families.build("gpt_oss", layers=24)
        compiler = HelpedCompiler(tmp_path / "log", ahead=True)
        glowplug.compile(
            model, compiler=compiler, cache_dir=tmp_path / "store", experts="inline", inside="eager", strict=True
        )
        model.generate(families.prompt(2, 5), max_new_tokens=2, do_sample=False)
        report = glowplug.report(model)
        counts = report.store.counts if report.store is not None else {}
        assert (counts["piece misses"], counts["piece stored"], report.compiled_pieces) == (missing, missing, missing)
        assert steps.noted == ["ahead", "program"]
        steps.noted.clear()
        shutil.rmtree(tmp_path / "store" / "manifests")
        next(iter((tmp_path / "store" / "pieces").rglob("*.glow"))).unlink()
    assert len(compiled_by(tmp_path / "log")) == 4
    assert os.getpid() not in compiled_by(tmp_path / "log")


def test_what_was_not_compiled_ahead_is_compiled_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    eager, model, _ = helped("llama4", tmp_path / "log", strict=True)
    assert same_tokens(eager, model)
    report = glowplug.report(model)
    pieces = {step.fingerprint for step in report.outlines[-1]} - {None}
    assert report.strategy == "stamped"
    assert pieces & steps.pieces and pieces - steps.pieces
    assert report.compiled_pieces == report.distinct_pieces


def test_pieces_of_other_sizes_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guards of a piece speak of symbols by name."""
    own, calls = handing_over.symbolic_sizes, []

    def sizes(captured: Captured) -> dict[str, Any]:
        calls.append(1)
        return {**own(captured), "L['inputs']": (len(calls),)}

    monkeypatch.setattr(handing_over, "symbolic_sizes", sizes)
    eager, model, _ = helped("gpt_oss", tmp_path / "log", strict=True)
    assert same_tokens(eager, model)
    assert compiled_by(tmp_path / "log").count(os.getpid()) == glowplug.report(model).distinct_pieces == 3


@pytest.mark.parametrize("fault", ["the trace fails", "the helper dies"])
def test_a_fault_ahead_costs_time_alone(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise CaptureError("not today")

    eager, model, compiler = helped("gpt_oss", tmp_path / "log", strict=True)
    if fault == "the trace fails":
        monkeypatch.setattr(start, "begin_pieces", fail)
    else:
        compiler.fault = "dies"
    assert same_tokens(eager, model)
    report = glowplug.report(model)
    assert (report.strategy, report.distinct_pieces, report.fallbacks) == ("stamped", 3, [])
    assert (os.getpid() in compiled_by(tmp_path / "log")) == (fault == "the helper dies")


def test_nothing_is_left_of_a_program_that_was_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise CompileError("not today")

    monkeypatch.setattr(start, "build_program", fail)
    eager, model, compiler = helped("gpt_oss", tmp_path / "log")
    assert same_tokens(eager, model)
    assert glowplug.report(model).strategy == "eager"
    assert compiler.helper is not None and not compiler.helper.waits
    monkeypatch.undo()
    compiled = glowplug.compile(model, compiler="eager", cache_dir="off", strict=True)
    assert same_tokens(eager, compiled)


def test_symbolic_sizes() -> None:
    def add(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return x + y + z

    def inputs(*sizes: int) -> tuple[Tensor, ...]:
        tensors = torch.ones(sizes[0], 3), torch.ones(sizes[1], 3), torch.ones(3)
        for tensor in tensors[:2]:
            torch._dynamo.mark_dynamic(tensor, 0)
        return tensors

    first, again = (capture(add, inputs(5, 5), symbolic_sizes) for _ in range(2))
    assert first == again and set(first) >= {"L['x']", "L['y']"} and "L['z']" not in first
    other = capture(lambda x, y, z: x.sum() + y + z, inputs(5, 7), symbolic_sizes)
    assert other != first
