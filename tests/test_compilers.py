"""The Inductor compiler: its options, several processes, and a toolchain that can't be trusted."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn

import families
import glowplug
from glowplug.background import job
from glowplug.compilers import InductorCompiler
from glowplug.compilers.eager import EagerCompiler
from glowplug.compilers.toolchain import cpu_toolchain
from glowplug.graph.fingerprint import Fingerprint
from glowplug.program import PieceCache, PieceStore
from glowplug.program import compiling as program_compiling
from glowplug.program.compiling import compile_pieces
from glowplug.store import ArtifactStore, LocalStore
from storing import StoringGraphs


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


def pieces(count: int, stable: bool = True) -> dict[Fingerprint, Any]:
    """Pieces of one addition, two additions, ..."""
    made = {}
    for number in range(1, count + 1):
        graph = fx.Graph()
        x = graph.placeholder("x")
        x.meta["example_value"] = torch.zeros(1)
        for _ in range(number):
            x = graph.call_function(torch.add, (x, 1))
        graph.output((x,))
        made[Fingerprint(f"{number:064}", (), stable)] = SimpleNamespace(gm=fx.GraphModule(nn.Module(), graph))
    return made


class Capture:
    """A capture whose compilation may write down relations between sizes."""

    def __init__(self) -> None:
        self.guards: list[Any] = []
        self.fake_mode = SimpleNamespace(shape_env=self)


def results(compiler: Stored, found: dict[Fingerprint, Any], cache: PieceCache | None = None, **more: Any) -> list[int]:
    """What the compiled pieces add to zero."""
    capture: Any = more.get("capture") or Capture()
    runners = compile_pieces(found, compiler, cache or PieceCache(), capture, None)
    return [int(runners[piece](torch.zeros(1))[0]) for piece in found]


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_compiling, "_cores", lambda: 4)


def test_forks_compile_and_the_parent_loads() -> None:
    compiler, cache = Stored(), PieceCache()
    found = results(compiler, pieces(9), cache)
    assert len(compiler.here) + len(compiler.loaded) == cache.count == 9
    # a piece of n additions gives n here, and its n + 2 nodes from a fork
    assert all(result in (number, number + 2) for number, result in enumerate(found, start=1))


def test_no_process_left_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise OSError("no more processes")

    monkeypatch.setattr(job, "fork_plainly", refuse)
    assert results(Stored(), pieces(3)) == [1, 2, 3]


@pytest.mark.parametrize("crash", ["raise", "exit", "garbage", "hang"])
def test_what_a_fork_does_not_deliver_is_compiled_here(crash: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_compiling, "_PATIENCE_S", 0.5)
    forks: list[int] = []
    fork = job.fork_plainly
    monkeypatch.setattr(job, "fork_plainly", lambda: forks.append(fork()) or forks[-1])
    assert results(Stored(crash), pieces(7)) == [1, 2, 3, 4, 5, 6, 7]
    assert len(forks) == 3
    for pid in forks:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # none is left behind


def test_a_piece_that_writes_down_relations_is_compiled_in_the_parent() -> None:
    capture = Capture()

    class Relating(Stored):
        def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
            capture.guards.append(SimpleNamespace(expr="x > 2"))
            return super().compile(piece, inputs)

        def compile_to_bytes(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> bytes:
            capture.guards.append(SimpleNamespace(expr="x > 2"))
            return super().compile_to_bytes(piece, inputs)

    cache = PieceCache()
    assert results(Relating(), pieces(5), cache, capture=capture) == [1, 2, 3, 4, 5]
    assert len(capture.guards) == 5 and cache.compiled == {}  # they hold in this capture alone


class Relating(StoringGraphs):
    """Each piece relies on a relation of sizes. Counts what is compiled in this process."""

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        for value in inputs:
            if isinstance(value, torch.Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape):
                assert value.numel() < 12345
        time.sleep(0.5 if os.getpid() == self.home else 0)  # so that forks take the other pieces
        return super().compile(piece, inputs)


@pytest.mark.skipif(sys.platform != "linux", reason="compiles in forks on Linux")
def test_relations_that_forks_write_down_reach_the_program(tmp_path: Path) -> None:
    """The parent compiles one piece at most, a call that breaks a relation is refused, and a warm start knows them."""
    own = families.build("glm4_moe", layers=8)
    for way in ("cold", "warm"):
        model, compiler = families.build("glm4_moe", layers=8), Relating()
        glowplug.compile(model, compiler=compiler, cache_dir=tmp_path, ends="compiled")
        with torch.no_grad():
            ids = families.prompt(2, 5)
            torch.testing.assert_close(model(ids).logits, own(ids).logits)
            report = glowplug.report(model)
            assert (report.start, report.strategy, report.fallbacks) == (way, "stamped", [])
            assert compiler.compiled <= 1
            model(families.prompt(20, 40))
        (fallback,) = report.fallbacks
        assert "12344" in fallback.reason or "12345" in fallback.reason


def test_what_another_process_would_not_know_goes_through_no_lasting_store(tmp_path: Path) -> None:
    compiler = Stored()
    cache = PieceCache(store=PieceStore(ArtifactStore(tmp_path / "store"), compiler, "test"))
    assert results(compiler, pieces(5, stable=False), cache) == [1, 2, 3, 4, 5]
    assert not LocalStore(tmp_path / "store", print).entries()


def test_an_error_ends_the_compilation() -> None:
    class Broken(Stored):
        def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
            raise ValueError("no")

    with pytest.raises(glowplug.CompileError, match="no"):
        results(Broken("raise"), pieces(5))


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
