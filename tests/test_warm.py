"""Warm starts: neither Dynamo nor a compiler runs, the answers are equal, and whatever changed is noticed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from families import build, prompt
from glowplug import start
from glowplug.program import PieceStore
from glowplug.store import ArtifactStore, Entry, LocalStore, opening
from glowplug.store.address import globals_of, modules_of, sources_of
from glowplug.store.envelope import pack, unpack
from glowplug.store.record import Record
from storing import PickleCompiler, Start

IDS = prompt(tokens=6)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A folder for a store."""
    return tmp_path / "store"


@pytest.fixture
def no_trace(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Whoever traces fails; counted by `counters` besides."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model is traced")

    monkeypatch.setattr(start, "capture", refuse)
    counters.clear()
    return monkeypatch


def eager(model: Any) -> torch.Tensor:
    """The model's own answer."""
    with torch.no_grad():
        logits: torch.Tensor = type(model).forward(model, IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize(("family", "layers"), [("gpt_oss", 8), ("glm4_moe", 12)])
def test_a_warm_start_traces_and_compiles_nothing(
    family: str, layers: int, store: Path, request: pytest.FixtureRequest
) -> None:
    cold = Start(build(family, layers=layers), store, IDS)
    assert (cold.report.start, cold.report.strategy) == ("cold", "stamped")
    assert cold.compiler.compiled == cold.report.distinct_pieces
    request.getfixturevalue("no_trace")
    model = build(family, seed=5, layers=layers)  # other values of the weights: the same program
    warm = Start(model, store, IDS, strict=True)
    assert (warm.report.start, warm.report.strategy) == ("warm", "stamped")
    assert (warm.compiler.compiled, warm.compiler.loaded) == (0, cold.report.distinct_pieces)
    assert not counters["frames"] and not counters["stats"]
    assert (warm.report.pieces, warm.report.template_layers) == (cold.report.pieces, cold.report.template_layers)
    assert torch.allclose(warm.logits, eager(model), rtol=1e-5, atol=1e-5)
    assert not warm.problems
    assert "warm start" in str(warm.report)
    again = Start(build(family, layers=layers), store, IDS)
    assert torch.equal(again.logits, cold.logits)
    ids = model.generate(IDS, max_new_tokens=4, do_sample=False)
    model.__dict__.pop("forward")
    assert torch.equal(ids, model.generate(IDS, max_new_tokens=4, do_sample=False))


def test_a_start_that_compares_nothing_does_not_say_that_a_program_was_compared(store: Path) -> None:
    for options, verified in (({"verify": "off"}, False), ({"verify": "off"}, False), ({}, True)):
        Start(build("gpt_oss"), store, IDS, **options)
        record = next(e for e in LocalStore(store, print).entries() if e.kind == "manifest")
        content = unpack(record.path.read_bytes(), "manifest", record.key, None)
        assert Record.from_bytes(content).verified == verified


@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe"])
def test_the_uncompiled_pieces_are_stored_too(family: str, store: Path) -> None:
    """With them, a program that another process made is compared with eager closely."""
    start = Start(build(family), store, IDS)
    pieces = PieceStore(ArtifactStore(store), start.compiler, start.compiler.environment(torch.device("cpu")))
    manifest = next(e for e in LocalStore(store, print).entries() if e.kind == "manifest")
    found = Record.from_bytes(unpack(manifest.path.read_bytes(), "manifest", manifest.key, None)).plan.pieces()
    assert found
    assert all(pieces.load_graph(piece.digest) is not None for piece in found)


def _config(model: Any) -> None:
    model.config.rms_norm_eps = 1e-3


def _attribute(model: Any) -> None:
    model.model.norm.variance_epsilon = 1e-3


def _dtype(model: Any) -> None:
    model.to(torch.float64)


CHANGES = {"config": _config, "attribute": _attribute, "dtype": _dtype}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_has_another_address(store: Path, change: str) -> None:
    Start(build("qwen3"), store, IDS)
    model = build("qwen3")
    CHANGES[change](model)
    start = Start(model, store, IDS)
    assert start.report.start == "cold"
    assert not start.report.fallbacks
    assert torch.allclose(start.logits, eager(model), rtol=1e-5, atol=1e-5)
    assert LocalStore(store, print).entries()[0].kind == "manifest"
    assert sum(entry.kind == "manifest" for entry in LocalStore(store, print).entries()) == 2


def test_an_option_of_torch_is_part_of_the_address(store: Path) -> None:
    Start(build("qwen3"), store, IDS)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        start = Start(build("qwen3"), store, IDS)
    finally:
        torch.set_float32_matmul_precision(before)
    assert start.report.start == "cold"
    assert start.compiler.compiled


def test_depths_share_their_pieces(store: Path) -> None:
    Start(build("gpt_oss", layers=6), store, IDS)
    deeper = Start(build("gpt_oss", layers=10), store, IDS)
    assert deeper.report.start == "cold"
    assert deeper.compiler.compiled == 0
    assert deeper.report.store is not None
    assert deeper.report.store.counts["piece hits"] >= deeper.report.distinct_pieces
    assert torch.allclose(deeper.logits, eager(build("gpt_oss", layers=10)), rtol=1e-5, atol=1e-5)


def test_another_models_manifest_is_refused(store: Path) -> None:
    """Moved, its envelope tells; packed anew for the place, it does not fit, or does not equal eager."""
    entries = []
    for family, layers in (("qwen3", 3), ("gpt_oss", 4), ("qwen3", 5)):
        Start(build(family, layers=layers), store, IDS)
        entries.append(next(e for e in LocalStore(store, print).entries() if e.kind == "manifest"))
    mine, *others = entries
    for other in others:
        content = other.path.read_bytes()
        forged = pack("manifest", mine.key, unpack(content, "manifest", other.key, None), None)
        for planted in (content, forged):
            mine.path.write_bytes(planted)
            start = Start(build("qwen3"), store, IDS)
            assert start.report.start == "cold"
            assert "not used" in start.problems
            assert torch.equal(start.logits, eager(build("qwen3")))


MODULE = """
from transformers import Qwen3ForCausalLM
SCALE = 2.0
class Mine(Qwen3ForCausalLM):
    pass
"""


def manifests(store: Path) -> list[Entry]:
    """The programs in a store."""
    return [entry for entry in LocalStore(store, print).entries() if entry.kind == "manifest"]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """A Python module with a class of models, and a model of it."""
    (tmp_path / "mine_for_warm.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    module: Any = importlib.import_module("mine_for_warm")

    def model() -> Any:
        found = build("qwen3")
        found.__class__ = module.Mine
        return found

    yield module, model
    del sys.modules["mine_for_warm"]


def test_two_versions_of_a_file_have_two_addresses(store: Path, mine: tuple[Any, Callable[[], Any]]) -> None:
    module, model = mine
    file = Path(module.__file__)
    assert Start(model(), store, IDS).report.start == "cold"
    assert Start(model(), store, IDS).report.start == "warm"
    file.write_text(MODULE + "\n# changed\n")
    changed = Start(model(), store, IDS)
    assert (changed.report.start, changed.problems) == ("cold", "")
    assert len(manifests(store)) == 2
    assert Start(model(), store, IDS).report.start == "warm"
    file.write_text(MODULE)
    assert Start(model(), store, IDS).report.start == "warm"
    assert len(manifests(store)) == 2


REPLACEMENTS = {
    "forward": lambda self, hidden_states: hidden_states * 2,
    "unused": property(lambda self: 1),
    "also_unused": classmethod(lambda cls: 2),
}


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_a_method_in_the_place_of_another_has_another_address(
    store: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Start(build("qwen3"), store, IDS).report.start == "cold"
    norm = type(build("qwen3").model.norm)
    with monkeypatch.context() as patched:
        patched.setattr(norm, name, REPLACEMENTS[name], raising=False)
        start = Start(build("qwen3"), store, IDS)
        assert (start.report.start, start.problems) == ("cold", "")
        assert torch.allclose(start.logits, eager(build("qwen3")), rtol=1e-5, atol=1e-5)
        assert Start(build("qwen3"), store, IDS).report.start == "warm"
    assert len(manifests(store)) == 2
    assert Start(build("qwen3"), store, IDS).report.start == "warm"


def test_code_in_memory_that_is_older_than_its_file_has_another_address(
    store: Path, tmp_path: Path, mine: tuple[Any, Callable[[], Any]]
) -> None:
    """A file may be edited after it was imported: its digest then is not that of the code that is traced."""
    module, model = mine
    Path(module.__file__).write_text(MODULE.replace("pass", "def other(self):\n        return 1"))
    assert Start(model(), store, IDS).report.start == "cold"
    importlib.reload(module)
    assert Start(model(), store, IDS).report.start == "cold"
    assert len(manifests(store)) == 2


def test_what_only_the_trace_shows_is_compared(
    store: Path, mine: tuple[Any, Callable[[], Any]], tmp_path: Path
) -> None:
    module, model = mine
    Start(model(), store, IDS)
    (manifest,) = manifests(store)
    body = json.loads(unpack(manifest.path.read_bytes(), "manifest", manifest.key, None))
    assert body["sources"] and "mine_for_warm" not in body["sources"]  # the address names it
    (tmp_path / "helper_for_warm.py").write_text("")
    source = "G['__import_mine_for_warm'].SCALE"
    assert globals_of([source, "G['other']"]) == {source: "2.0"}
    sources = sources_of(modules_of([importlib.import_module("helper_for_warm").__file__ or ""]))

    def plant(**changes: Any) -> None:
        ArtifactStore(store).put("manifest", manifest.key, json.dumps({**body, **changes}).encode())

    plant(sources=sources, globals={source: "2.0"})
    assert Start(model(), store, IDS).report.start == "warm"
    (tmp_path / "helper_for_warm.py").write_text("# changed")
    changed = Start(model(), store, IDS)
    assert changed.report.start == "cold"
    assert "source of helper_for_warm was changed" in changed.problems
    plant(globals={source: "2.0"})
    module.SCALE = 3.0
    changed = Start(model(), store, IDS)
    assert changed.report.start == "cold"
    assert "has changed" in changed.problems


def test_which_store_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "default_root", lambda: tmp_path / "own")
    monkeypatch.setenv("GLOWPLUG_CACHE", str(tmp_path / "named"))
    Start(build("qwen3"), None, IDS)
    assert (tmp_path / "named").is_dir()
    Start(build("qwen3"), tmp_path / "given", IDS)
    assert (tmp_path / "given").is_dir()
    assert not (tmp_path / "own").exists()
    assert Start(build("qwen3"), None, IDS).report.start == "warm"
    off = Start(build("qwen3"), "off", IDS)
    assert (off.report.start, off.report.store) == ("cold", None)


INDUCTOR = """
import json, os, subprocess, sys
started = []
own = subprocess.Popen.__init__
def noting(self, args, *rest, **more):
    started.append(args if isinstance(args, str) else " ".join(map(str, args)))
    own(self, args, *rest, **more)
subprocess.Popen.__init__ = noting
import torch
torch.set_num_threads(1)
import glowplug
from families import build, prompt
from torch._dynamo.utils import counters
model = build("gpt_oss", layers=4)
with torch.no_grad():
    eager = model(prompt(tokens=6), use_cache=False).logits
    glowplug.compile(model, cache_dir=sys.argv[1], ends="compiled", experts="inline")
    logits = model(prompt(tokens=6), use_cache=False).logits
report = glowplug.report(model)
print(json.dumps({
    "start": report.start, "strategy": report.strategy, "problems": report.store.problems,
    "error": ((logits - eager).norm() / eager.norm()).item(), "frames": dict(counters["frames"]),
    "compiler": "torch._inductor.compile_fx" in sys.modules or "torch._inductor.graph" in sys.modules,
    "started": [line for line in started if "++" in line or "gcc" in line or "clang" in line],
    "logits": logits.flatten()[:8].tolist(),
}))
"""


@pytest.mark.inductor
def test_inductor_does_not_run_in_a_warm_process(store: Path, tmp_path: Path) -> None:
    told = []
    for number in range(2):  # each with a cache of Inductor's own that is empty
        done = subprocess.run(
            [sys.executable, "-c", INDUCTOR, str(store)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
                "PYTHONHASHSEED": str(number + 1),  # sets have another order
                "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"inductor{number}"),
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout.splitlines()[-1]))
    cold, warm = told
    assert (cold["start"], warm["start"]) == ("cold", "warm"), warm
    assert cold["compiler"] and cold["started"]
    assert not warm["frames"] and not warm["started"]
    assert not cold["problems"] and not warm["problems"]
    assert warm["logits"] == cold["logits"]
    assert max(cold["error"], warm["error"]) < 1e-4


def test_the_compiler_of_these_tests_stores() -> None:
    from glowplug.compilers.base import StoringCompiler

    assert isinstance(PickleCompiler(), StoringCompiler)
