"""The Inductor compiler: its options, several processes, and a toolchain that can't be trusted."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn

import families
import glowplug
from glowplug.compilers import InductorCompiler, parallel
from glowplug.compilers.eager import EagerCompiler
from glowplug.compilers.parallel import Job, compile_jobs
from glowplug.compilers.toolchain import cpu_toolchain


class Stored(EagerCompiler):
    """Runs pieces uncompiled, but in forks: an artifact is the number of the piece."""

    name = "stored"

    def __init__(self, crash: str = "") -> None:
        self.crash = crash
        self.home = os.getpid()
        self.here: list[fx.GraphModule] = []
        self.loaded: list[bytes] = []

    def forks(self, inputs: Sequence[Sequence[Any]], *, several: bool = False) -> bool:
        return True

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        assert os.getpid() == self.home
        self.here.append(piece)
        return piece.forward

    def environment(self, device: torch.device) -> str:
        return "test"

    def compile_and_store(self, piece: Any, inputs: Sequence[Any]) -> tuple[Any, bytes]:
        return self.compile(piece, inputs), str(len(piece.graph.nodes)).encode()

    def compile_to_bytes(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> bytes:
        assert os.getpid() != self.home
        if self.crash == "raise":
            raise RuntimeError("in the child")
        if self.crash == "exit":
            os._exit(3)
        if self.crash == "hang":
            import time

            time.sleep(600)
        return b"garbage" if self.crash == "garbage" else str(len(piece.graph.nodes)).encode()

    def load(self, artifact: bytes) -> Callable[..., Sequence[Any]]:
        number = int(artifact)
        self.loaded.append(artifact)
        return lambda x: (x * 0 + number,)


def jobs(count: int) -> list[Job]:
    made = []
    for number in range(1, count + 1):
        graph = fx.Graph()
        x = graph.placeholder("x")
        for _ in range(number):
            x = graph.call_function(torch.add, (x, 1))
        graph.output((x,))
        made.append(Job(fx.GraphModule(nn.Module(), graph), [torch.zeros(1)]))
    return made


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_cores", lambda: 4)


def test_children_compile_and_the_parent_loads() -> None:
    compiler, advanced = Stored(), []
    done = compile_jobs(compiler, jobs(9), lambda: 0, lambda: advanced.append(1))
    assert len(done) == len(advanced) == 9
    assert len(compiler.here) + len(compiler.loaded) == 9
    # a piece of n additions gives x + n here, and its n + 2 nodes from a child
    for number, result in enumerate(done, start=1):
        assert float(result.run(torch.zeros(1))[0]) in (number, number + 2)


def test_no_process_left_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "fork", lambda work: None)
    done = compile_jobs(Stored(), jobs(3), lambda: 0, lambda: None)
    assert [float(result.run(torch.zeros(1))[0]) for result in done] == [1, 2, 3]


@pytest.mark.parametrize("crash", ["raise", "exit", "garbage", "hang"])
def test_what_a_child_does_not_deliver_is_compiled_here(crash: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_PATIENCE_S", 0.5)
    children, fork = [], parallel.fork
    monkeypatch.setattr(parallel, "fork", lambda work: children.append(fork(work)) or children[-1])
    compiler = Stored(crash)
    done = compile_jobs(compiler, jobs(7), lambda: 0, lambda: None)
    assert [float(result.run(torch.zeros(1))[0]) for result in done] == [1, 2, 3, 4, 5, 6, 7]
    assert len(children) == 3
    for child in children:
        with pytest.raises(ChildProcessError):
            os.waitpid(child.pid, os.WNOHANG)  # none is left behind


def test_an_error_ends_the_compilation() -> None:
    class Broken(Stored):
        def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
            raise ValueError("no")

    done = compile_jobs(Broken("raise"), jobs(5), lambda: 0, lambda: None)
    assert any(isinstance(result.error, ValueError) for result in done)


def test_inductor_in_several_processes_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("a process that uses a GPU does not fork")
    loaded, load = [], InductorCompiler.load
    monkeypatch.setattr(InductorCompiler, "load", lambda self, data: loaded.append(data) or load(self, data))
    eager, compiled = families.build("glm4_moe"), families.build("glm4_moe")
    glowplug.compile(compiled, identity="baked")
    ids = families.prompt(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, eager(ids).logits, rtol=1e-4, atol=1e-4)
    assert glowplug.report(compiled).fallbacks == []
    assert loaded


def test_options_reach_inductor() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    glowplug.compile(model, compiler=InductorCompiler({"no_such_option": 1}), strict=True)
    with pytest.raises(glowplug.GlowplugError, match="no_such_option"), torch.no_grad():
        model(torch.randn(2, 4))


def test_an_instruction_set_that_does_not_work_is_found_out() -> None:
    toolchain = cpu_toolchain()
    toolchain.join()
    before = toolchain.trusted
    toolchain.trusted = True
    try:
        assert toolchain.options() == {"cpp.vec_isa_ok": True}
        assert toolchain.distrust()
        assert toolchain.options() == {}
        assert not toolchain.distrust()
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
        x = torch.randn(2, 4)
        with torch.no_grad():
            expected = model(x)
            torch.testing.assert_close(glowplug.compile(model)(x), expected)
    finally:
        toolchain.trusted = before
