"""Stored pieces load without Inductor's compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import families
import glowplug
from glowplug.compilers.light import extern_kernels, light_source, loading_lightly

HEADER = """import torch
from torch._inductor.select_algorithm import extern_kernels
from torch._inductor.codegen.multi_kernel import MultiKernelCall
from torch._inductor.codegen.memory_planning import _align as align
"""
WARM = """
import json, sys
import torch
import families, glowplug

eager, model = families.build("gpt_oss", layers=6), families.build("gpt_oss", layers=6)
glowplug.compile(model, cache_dir=sys.argv[1], ends="compiled", inside="eager")
ids = families.prompt(2, 5)
with torch.no_grad():
    equal = torch.allclose(model(ids).logits, eager(ids).logits, rtol=1e-4, atol=1e-4)
print(json.dumps([glowplug.report(model).start, equal, sorted(name for name in sys.argv[2:] if name in sys.modules)]))
"""
COMPILER = ("compile_fx", "select_algorithm", "lowering", "decomposition", "graph", "scheduler", "ir")


def test_imports_that_nothing_uses_are_left_out() -> None:
    assert light_source(HEADER + "def call(args): pass\n") == "import torch\ndef call(args): pass\n"


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("align", "align(8)"),
        ("MultiKernelCall", "MultiKernelCall('x')"),
        ("extern_kernels", "extern_kernels.convolution(x)"),
        ("extern_kernels", "f(extern_kernels)"),
    ],
)
def test_what_is_used_is_imported_from_where_inductor_has_it(name: str, use: str) -> None:
    (line,) = [line for line in HEADER.splitlines() if line.endswith(name)]
    assert light_source(f"{HEADER}{use}\n").splitlines() == ["import torch", line, use]


def test_products_are_those_of_torch() -> None:
    source = light_source(HEADER + "extern_kernels.mm(a, b, out=c)\nextern_kernels.addmm(d, a, b, alpha=1, out=c)\n")
    assert "torch._inductor" not in source
    a, b, d = torch.randn(2, 3), torch.randn(3, 4), torch.randn(4)
    scope = {"a": a, "b": b, "c": torch.empty(2, 4), "d": d}
    exec(source, scope)
    torch.testing.assert_close(scope["c"], d + a @ b)


def test_products_are_those_that_inductor_means() -> None:
    from torch._inductor.select_algorithm import extern_kernels as inductors

    for name, function in vars(extern_kernels).items():
        assert getattr(inductors, name) is function


def test_a_profiler_names_a_stored_piece(tmp_path: Path) -> None:
    ids = families.prompt(2, 5)
    for _ in range(2):
        model = families.build("qwen3", layers=6)
        glowplug.compile(model, cache_dir=tmp_path / "store", ends="compiled", inside="eager")
        with torch.no_grad(), torch.profiler.profile() as profile:
            model(ids)
    assert glowplug.report(model).start == "warm"
    assert any(event.key.startswith("## Call CompiledFxGraph") for event in profile.key_averages())


def test_a_warm_start_imports_no_compiler(tmp_path: Path) -> None:
    """Nor does a piece that runs: it is Inductor's code, compiled by the first process."""
    names = [f"torch._inductor.{name}" for name in COMPILER]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    outputs = []
    for _ in range(2):
        command = [sys.executable, "-c", WARM, str(tmp_path / "store"), *names]
        outputs.append(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    assert outputs[0].startswith('["cold", true')
    assert outputs[1].strip() == '["warm", true, []]'


def test_a_thread_that_loads_takes_the_hash_of_torch_from_the_piece() -> None:
    from torch._inductor import codecache
    from torch._inductor.async_compile import CompiledTritonKernels

    with loading_lightly(b"stored"):
        assert codecache.torch_key() == b"stored"
        stored = CompiledTritonKernels.key("source")
        elsewhere: list[bytes] = []
        thread = threading.Thread(target=lambda: elsewhere.append(codecache.torch_key()))
        thread.start()
        thread.join()
    assert [codecache.torch_key()] == elsewhere != [b"stored"]
    assert CompiledTritonKernels.key("source") != stored


@pytest.fixture
def patched() -> None:
    """The patches, which are permanent, are in place."""
    with loading_lightly(b""):
        pass


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize(("stored", "pool"), [(2, False), (1, True), (0, True)])
def test_processes_compile_kernels_only_if_some_are_not_stored(
    stored: int, pool: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import FxGraphCache
    from torch._inductor.triton_bundler import TritonBundle, TritonBundler

    monkeypatch.setattr(TritonBundler, "read_and_emit", lambda bundle: None)
    monkeypatch.setattr("torch._inductor.async_compile.get_compile_threads", lambda: 8)
    monkeypatch.setattr(AsyncCompile, "process_pool", lambda: SimpleNamespace(ready=lambda: True))
    monkeypatch.setattr(AsyncCompile, "_ready_future", SimpleNamespace(done=lambda: True))
    answers: list[bool] = []
    graph: Any = SimpleNamespace(
        source_code="a = async_compile.triton('a', 1)\nb = async_compile.triton('b', 2)\n",
        _triton_bundle=TritonBundle([], [None] * stored),
        after_deserialization=lambda constants: answers.append(AsyncCompile.use_process_pool()),
    )
    with loading_lightly(b""):
        FxGraphCache.cache_hit_post_compile(graph, {}, None)
    assert answers == [pool]
    assert AsyncCompile.use_process_pool()


@pytest.mark.usefixtures("patched")
def test_a_tuner_copies_what_its_kernel_writes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Inductor's does, which imports its compiler for that."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    tuner: Any = SimpleNamespace(mutated_arg_names=["b", "d"], fn=SimpleNamespace(arg_names=list("abcde")))
    a, b, c, d, e = (torch.randn(4, 3).t() for _ in range(5))
    light: Any = CachingAutotuner.maybe_clone_args
    for exclude, args, kwargs in (
        ((), (a, b, c), {"d": d, "e": e}),
        (("b",), (a, b, 3), {"d": d}),
        (("d",), (a, b, c, d, e), {}),
        ((), (a, b, c, d, e, 7), {}),
    ):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "torch._inductor.compile_fx", raising=False)
            cloned, cloned_kwargs = light(tuner, exclude, *args, **kwargs)
            assert "torch._inductor.compile_fx" not in sys.modules
        expected, expected_kwargs = light.__wrapped__(tuner, exclude, *args, **kwargs)
        assert (len(cloned), cloned_kwargs.keys()) == (len(expected), expected_kwargs.keys())
        for given, ours, theirs in zip(
            (*args, *kwargs.values()),
            (*cloned, *cloned_kwargs.values()),
            (*expected, *expected_kwargs.values()),
            strict=True,
        ):
            assert (ours is given) == (theirs is given)
            if isinstance(given, torch.Tensor):
                assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
