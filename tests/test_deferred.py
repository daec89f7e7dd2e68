"""Deferred pieces serve uncompiled, are compiled beside serving, tried, and swapped in; or stay as they are."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx
from transformers import DynamicCache, PreTrainedModel

import families
import glowplug
from glowplug.compilers.eager import EagerCompiler
from glowplug.engine import Engine, engine_of
from glowplug.graph.fingerprint import fingerprint
from glowplug.program.slots import PieceSlot, choose_deferred, with_arrived
from storing import StoringGraphs
from test_changes import eager, quiet

DEPTH = 20


class Storing(EagerCompiler):
    """Runs pieces as they are; what forks make of them is known here by their fingerprints.

    Args:
        fault: what a fork does to a piece: `"wrong"`, `"raises"` (when it runs), `"dies"`, `"garbage"` or nothing.
    """

    name = "storing"

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.home = os.getpid()
        self.compiled_here: list[str] = []
        self.engine: Engine | None = None
        self.runs: Counter[str] = Counter()

    def forks(self, inputs: Sequence[Sequence[Any]], *, several: bool = False) -> bool:
        return True

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        self.compiled_here.append(fingerprint(piece).digest)
        return piece.forward

    def environment(self, device: torch.device) -> str:
        return "test"

    def compile_and_store(self, piece: Any, inputs: Sequence[Any]) -> tuple[Any, bytes]:
        return self.compile(piece, inputs), fingerprint(piece).digest.encode()

    def compile_to_bytes(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> bytes:
        assert os.getpid() != self.home
        if self.fault == "dies":
            os._exit(3)
        return b"garbage" if self.fault == "garbage" else fingerprint(piece).digest.encode()

    def load(self, artifact: bytes) -> Callable[..., Sequence[Any]]:
        assert self.engine is not None
        digest = artifact.decode()
        (slot,) = [s for s in self.engine.compilation.pieces.slots if s.address == digest]

        def run(*args: Any) -> Sequence[Any]:
            self.runs[digest] += 1
            if self.fault == "raises":
                raise RuntimeError("a compiled piece that fails")
            outputs = slot.graph(*args)
            return tuple(value * 1.01 for value in outputs) if self.fault == "wrong" else outputs

        return run


def started(fault: str = "", **options: Any) -> tuple[PreTrainedModel, Storing]:
    """A deep model after its first call."""
    compiler = Storing(fault)
    model = glowplug.compile(families.build("gpt_oss", layers=DEPTH), compiler=compiler, **options)
    compiler.engine = engine_of(model)
    with torch.no_grad():
        model(families.prompt(1, 3))
    return model, compiler


def uncompiled(model: PreTrainedModel) -> int:
    """How many pieces the model's programs would run uncompiled."""
    engine = engine_of(model)
    assert engine is not None
    programs = [with_arrived(ready.program) for ready in engine.compilation.programs]
    return sum(isinstance(run, PieceSlot) for program in programs for run in program.slots.values())


@pytest.mark.parametrize("stamp", ["auto", "off"])
def test_they_start_uncompiled_and_are_swapped_in(stamp: str) -> None:
    model, compiler = started(stamp=stamp)
    report = glowplug.report(model)
    assert (report.distinct_pieces, report.pending_pieces, len(compiler.compiled_here)) == (3, 2, 1)
    assert uncompiled(model) == 2
    assert "still being compiled" in str(report)
    glowplug.settle(model)
    assert (report.distinct_pieces, report.pending_pieces, uncompiled(model)) == (3, 0, 0)
    tried = sum(compiler.runs.values())
    assert tried >= 2
    torch.testing.assert_close(quiet(model), eager(model), rtol=1e-5, atol=1e-5)
    assert sum(compiler.runs.values()) == tried + 2
    assert report.fallbacks == []


def test_a_sequence_keeps_the_pieces_it_began_with() -> None:
    model, compiler = started()
    engine = engine_of(model)
    assert engine is not None
    with torch.no_grad():
        job: Any = engine.compilation.pieces.slots[0].job
        cache = DynamicCache(config=model.config)
        job.ended, ended = (lambda *_: False), job.ended
        model(families.prompt(1, 5), past_key_values=cache)
        job.ended = ended
        assert job.ended(time.monotonic() + 120)
        model(families.prompt(1, 1), past_key_values=cache)
        assert uncompiled(model) == 2
        model(families.prompt(1, 5))
    assert uncompiled(model) == 0
    assert sum(compiler.runs.values()) >= 2


@pytest.mark.parametrize("fault", ["wrong", "raises", "dies", "garbage"])
def test_a_fault_leaves_them_uncompiled(fault: str, glowplug_log: pytest.LogCaptureFixture) -> None:
    model, _ = started(fault)
    glowplug.settle(model)
    assert uncompiled(model) == 2
    assert glowplug.report(model).pending_pieces == 0
    assert glowplug_log.text.count("stays uncompiled") == 2
    for _ in range(2):
        torch.testing.assert_close(quiet(model), eager(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"ends": "compiled"}, {"strict": True}, {"identity": "baked"}], ids=str)
def test_all_compiled_before_the_first_answer(options: dict[str, Any]) -> None:
    model, compiler = started(experts="opaque", **options)
    assert compiler.engine is not None and compiler.engine.compilation.pieces.slots == []
    torch.testing.assert_close(quiet(model), eager(model), rtol=1e-5, atol=1e-5)
    assert uncompiled(model) == glowplug.report(model).pending_pieces == 0


def test_a_change_of_weights_meanwhile_is_followed() -> None:
    model, _ = started()
    before = eager(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    glowplug.settle(model)
    assert uncompiled(model) == 0
    expected = eager(model)
    assert not torch.allclose(expected, before, atol=1e-3)
    torch.testing.assert_close(quiet(model), expected, rtol=1e-5, atol=1e-5)


def test_which_pieces_are_deferred() -> None:
    plain = fx.symbolic_trace(torch.nn.Linear(2, 2))

    class Writes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1)

    def choose(*counts: int, writes: frozenset[int] = frozenset()) -> list[int]:
        uses: Counter[Any] = Counter(dict(enumerate(counts)))
        graph = fx.symbolic_trace(Writes())
        pieces: Any = {n: FakePiece(graph if n in writes else plain) for n in uses}
        return sorted(choose_deferred(uses, pieces))

    assert choose(1, 35, 1) == [0, 2]
    assert choose(1, 3, 88, 1) == [0, 1, 3]
    assert choose(1, 3, 1) == [0, 2]
    assert choose(1, 1, 3, 1) == choose(1, 1) == []
    assert choose(*[1] * 37) == []
    assert choose(12, 12, 12, 1) == [3]
    assert choose(1, 35, 1, writes=frozenset({2})) == [0]


class FakePiece:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm


@pytest.mark.inductor
def test_through_inductor() -> None:
    if torch.cuda.is_initialized():
        pytest.skip("a process that uses a GPU does not fork")
    model = families.build("gpt_oss", layers=DEPTH)
    settings: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    prompt = families.prompt(1, 7)
    with torch.no_grad():
        expected = model.generate(prompt, **settings)
        glowplug.compile(model)
        assert torch.equal(model.generate(prompt, **settings), expected)
        assert glowplug.report(model).pending_pieces == 2
        glowplug.settle(model)
        assert glowplug.report(model).pending_pieces == uncompiled(model) == 0
        assert torch.equal(model.generate(prompt, **settings), expected)
    assert glowplug.report(model).fallbacks == []


@pytest.mark.skipif(sys.platform != "linux", reason="pieces are deferred on Linux")
def test_pieces_compile_before_forks_are_asked_for() -> None:
    """Asking for forks may wait for seconds, as a toolchain is prepared in a thread, which no fork has."""
    events: list[str] = []

    class Noting(StoringGraphs):
        def forks(self, inputs: Any, *, several: bool = False) -> bool:
            events.append(f"forks, {several}")
            return super().forks(inputs, several=several)

        def compile(self, piece: Any, inputs: Any) -> Any:
            events.append("compile")
            return super().compile(piece, inputs)

    model = families.build("gpt_oss", layers=12)
    glowplug.compile(model, compiler=Noting(), cache_dir="off", inside="eager")
    with torch.no_grad():
        model(families.prompt(1, 5))
    assert glowplug.report(model).pending_pieces == 2
    assert events == ["compile", "forks, False"]
    glowplug.settle(model)
