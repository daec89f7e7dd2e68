"""On a CUDA GPU: the same tokens as eager, opaque and inline, shared experts on a side stream. Skipped elsewhere."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import families
import glowplug
from glowplug.background.job import Job
from glowplug.compilers import InductorCompiler
from glowplug.cuda_graphs.recorder import CudaRecorder
from glowplug.frontends.hf import front
from glowplug.ops.grouped_attention import attention_in_products
from glowplug.ops.linears import linears
from glowplug.ops.moe import moe_forward_shared
from glowplug.program import build, compiling
from test_step_attention import Calls

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Eager and compiled matrix products alike in full float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counting = Calls()
    monkeypatch.setattr(front, "step_attention", counting)
    return counting


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("experts", ["inline", "opaque"])
def test_tokens_equal_eager(family: str, experts: str) -> None:
    eager, compiled = families.build(family).cuda(), families.build(family).cuda()
    glowplug.compile(compiled, experts=experts, compiler="eager")
    ids = families.prompt(2, 5).cuda()
    outputs = [model.generate(ids, max_new_tokens=24, do_sample=False) for model in (eager, compiled)]
    assert torch.equal(*outputs)
    assert glowplug.report(compiled).fallbacks == []


@pytest.mark.parametrize("family", families.FAMILIES)
def test_deep_and_of_half_precision(family: str) -> None:
    """The kernel of the experts rounds otherwise than transformers' own, which many layers amplify."""
    model = families.build(family, layers=24).to("cuda", torch.bfloat16)
    glowplug.compile(model, experts="inline", compiler="eager")
    model.generate(families.prompt(2, 5).cuda(), max_new_tokens=3, do_sample=False)
    report = glowplug.report(model)
    assert (report.strategy, report.fallbacks) == ("stamped", [])


def test_inductor() -> None:
    eager, compiled = families.build("glm4_moe").cuda(), families.build("glm4_moe").cuda()
    glowplug.compile(compiled, experts="opaque")
    ids = families.prompt(2, 5).cuda()
    with torch.no_grad():
        expected, output = eager(ids).logits, compiled(ids).logits
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert glowplug.report(compiled).fallbacks == []


@pytest.fixture
def nothing_compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("this process compiles a piece")

    monkeypatch.setattr(compiling._Compilation, "_compile", refuse)


@pytest.mark.usefixtures("nothing_compiled_here")
@pytest.mark.parametrize("helped", [True, False])
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "glm4_moe", "deepseek_v3"])
def test_forks_compile_every_piece(
    family: str, helped: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them calls the driver, for which this process would have to compile its piece. A helper compiles all
    pieces of most models ahead of their trace."""
    ahead: set[Any] = set()
    own = build.compile_ahead
    monkeypatch.setattr(build, "compile_ahead", lambda pieces, *args: (ahead.update(pieces), own(pieces, *args)))
    if not helped:
        monkeypatch.setattr(InductorCompiler, "hand_over", lambda *_: None)
    model = families.build(family, layers=12).to("cuda", torch.bfloat16)
    glowplug.compile(model, experts="inline")
    with caplog.at_level(logging.DEBUG, logger="glowplug"), torch.no_grad():
        model(families.prompt(2, 5).cuda())
    assert glowplug.report(model).strategy == "stamped"
    assert "not compiled in a fork" not in caplog.text
    assert "a helper" not in caplog.text
    pieces = {step.fingerprint for step in glowplug.report(model).outlines[-1]} - {None}
    assert ahead == (pieces if family != "deepseek_v3" else set())


@pytest.mark.usefixtures("nothing_compiled_here")
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "glm4_moe"])
def test_a_fork_builds_what_this_process_serves(
    family: str, background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the weights load, or in the background; no other process imports torch anew."""
    monkeypatch.setattr(Job, "spawn", lambda *_: Job("a new process"))
    made = families.build(family, layers=12).to(torch.bfloat16)
    made.save_pretrained(tmp_path / "model")
    ids, store = families.prompt(2, 5).cuda(), tmp_path / "store"
    if background:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="cuda", dtype=torch.bfloat16)
        glowplug.compile(model, cache_dir=store, background=True)
        model.generate(ids, max_new_tokens=2, do_sample=False)
        glowplug.settle(model)
        model.generate(ids, max_new_tokens=2, do_sample=False)
    else:
        model = glowplug.from_pretrained(tmp_path / "model", device_map="cuda", dtype=torch.bfloat16, cache_dir=store)
        model.generate(ids, max_new_tokens=2, do_sample=False)
    report = glowplug.report(model)
    assert report.elsewhere is not None
    assert (report.elsewhere.reason, report.start, report.strategy) == (None, "warm", "stamped")


WARM = """
import json, sys, torch
import families, glowplug
from torch._inductor import async_compile, codecache
from triton.compiler.compiler import ASTSource
from triton.runtime import build, cache

built = build._build
build._build = lambda *args: made.append(args[0]) or built(*args)
made = []
own = ASTSource.make_ir
ASTSource.make_ir = lambda source, *args: made.append(source.name) or own(source, *args)
hashed = lambda name, own: lambda *args: made.append(name) or own(*args)
cache.triton_key = hashed("Triton", cache.triton_key)
codecache.build_code_hash = hashed("torch", codecache.build_code_hash)
model = families.build("glm4_moe", layers=12).to("cuda", torch.bfloat16)
glowplug.compile(model, cache_dir=sys.argv[1], experts="inline")
model.generate(families.prompt(1, 5).cuda(), max_new_tokens=3, do_sample=False)
made += ["a pool"] * async_compile.AsyncCompile.process_pool.cache_info().currsize
made += ["the compiler"] * ("torch._inductor.compile_fx" in sys.modules)
print(json.dumps([glowplug.report(model).start, made]))
"""


def test_a_warm_start_compiles_nothing(tmp_path: Path) -> None:
    """Not even where Triton's cache is empty: kernels of glowplug's own ops are stored with the pieces, and so is what
    Triton builds in C. Neither is torch or Triton hashed, nor a pool of processes started."""
    outputs = []
    for number in range(2):
        caches = {"TRITON_CACHE_DIR": f"{tmp_path}/triton{number}", "TORCHINDUCTOR_CACHE_DIR": f"{tmp_path}/{number}"}
        environment = os.environ | caches | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", WARM, str(tmp_path / "store")]
        output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        outputs.append(json.loads(output.splitlines()[-1]))
    assert [start for start, _ in outputs] == ["cold", "warm"]
    assert outputs[1][1] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "glm4_moe"])
@pytest.mark.parametrize("extent", [None, 40, 700])
def test_attention_of_one_token(family: str, dtype: torch.dtype, extent: int | None, calls: Calls) -> None:
    """Over a growing cache, and static ones for which it takes a fused kernel and matrix products."""
    eager, model = (families.build(family).to("cuda", dtype) for _ in range(2))
    glowplug.compile(model, experts="inline", compiler="eager", cuda_graphs="off", strict=True)
    for batch in (1, 3):
        ids = families.prompt(batch, 9).cuda()
        caches = [StaticCache(m.config, max_cache_len=extent) if extent else DynamicCache() for m in (eager, model)]
        with torch.no_grad():
            for begin, end in ((0, 5), (5, 6), (6, 7), (7, 8)):
                positions = torch.arange(begin, end, device="cuda").expand(batch, -1)
                expected, output = (
                    m(ids[:, begin:end], position_ids=positions, past_key_values=cache).logits.float()
                    for m, cache in zip((eager, model), caches, strict=True)
                )
                error = (output - expected).norm() / expected.norm()
                assert error < (1e-5 if dtype == torch.float32 else 0.15)  # a router may choose another expert
    assert calls.ran[1] == 2 * 3 * model.config.num_hidden_layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_tokens", [520, 1024, 5001])
def test_attention_in_products(dtype: torch.dtype, kv_tokens: int) -> None:
    packed = 3 * torch.randn(2, 4, 8, 128, device="cuda", dtype=dtype)
    key, value = (torch.randn(2, 4, kv_tokens, 128, device="cuda", dtype=dtype) for _ in range(2))
    mask = torch.zeros(2, 1, 1, kv_tokens, device="cuda").masked_fill_(
        torch.rand(2, 1, 1, kv_tokens, device="cuda") < 0.3, -torch.inf
    )
    mask[0] = torch.finfo(torch.float32).min  # nothing but padding
    output = attention_in_products(packed, key, value, mask, 0.1)
    assert output.isfinite().all()
    expected = torch.nn.functional.scaled_dot_product_attention(
        packed.double(), key.double(), value.double(), mask.double(), scale=0.1
    )
    assert (output[1].double() - expected[1]).norm() / expected[1].norm() < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [(33,), (512, 5), (1000, 16, 72)])
@pytest.mark.parametrize("inputs", [8, 500, 512, 2880])
def test_linears(dtype: torch.dtype, bias: bool, outputs: tuple[int, ...], inputs: int) -> None:
    weights = [torch.randn(n, inputs, device="cuda", dtype=dtype) for n in outputs]
    biases = [torch.randn(n, device="cuda", dtype=dtype) if bias else None for n in outputs]
    for shape in ((1,), (3, 5), (16, 1), (17,)):
        x = torch.randn(*shape, inputs, device="cuda", dtype=dtype)
        for output, weight, added in zip(linears(x, weights, biases), weights, biases, strict=True):
            expected = torch.nn.functional.linear(
                x.double(), weight.double(), added.double() if added is not None else None
            )
            assert output.shape == expected.shape and output.is_contiguous()
            assert (output.double() - expected).norm() / expected.norm() < 5e-3


def test_cold_then_warm_then_behind_the_weights_then_in_the_background(tmp_path: Path) -> None:
    """On a GPU the other process is a new one. In half precision, deep enough for rounding to grow."""
    original = families.build("glm4_moe", layers=24).to("cuda", torch.bfloat16)
    original.save_pretrained(tmp_path / "model")
    ids = families.prompt(2, 5).cuda()
    with torch.no_grad():
        expected = original(ids).logits.float()
    for way, store, start in (
        ("compile", "a", "cold"),
        ("compile", "a", "warm"),
        ("from_pretrained", "b", "warm"),
        ("background", "c", "warm"),
    ):
        options: dict[str, Any] = {"experts": "opaque", "cache_dir": tmp_path / store}
        if way == "from_pretrained":
            model = glowplug.from_pretrained(tmp_path / "model", device_map="cuda", dtype=torch.bfloat16, **options)
        else:
            model = type(original).from_pretrained(tmp_path / "model", device_map="cuda", dtype=torch.bfloat16)
            glowplug.compile(model.eval().requires_grad_(False), background=way == "background", **options)
        with torch.no_grad():
            for _ in range(3):
                logits = model(ids).logits.float()
                glowplug.settle(model)
        report = glowplug.report(model)
        assert (report.strategy, report.start, report.fallbacks) == ("stamped", start, []), way
        assert report.elsewhere is None or report.elsewhere.reason is None
        assert (logits - expected).norm() < 0.2 * expected.norm()


def test_shared_experts_run_on_another_stream() -> None:
    model = families.build("glm4_moe").cuda()
    block = next(m for m in model.modules() if hasattr(m, "shared_experts"))
    streams = []
    block.shared_experts.register_forward_pre_hook(lambda *_: streams.append(torch.cuda.current_stream()))
    hidden = torch.randn(2, 64, model.config.hidden_size, device="cuda")
    with torch.no_grad():
        expected = type(block).forward(block, hidden)
        for _ in range(20):
            torch.testing.assert_close(moe_forward_shared(block, hidden), expected, rtol=1e-5, atol=1e-5)
    assert streams[0] == torch.cuda.current_stream()
    assert all(stream != torch.cuda.current_stream() for stream in streams[1:])


def test_recording_goes_on_after_all_recordings_are_gone() -> None:
    """They share a pool, which ends with the last of them."""
    recorder = CudaRecorder(torch.device("cuda", 0))
    x = torch.ones(4, device="cuda")
    for number in range(1, 4):
        recording: Any = recorder.record(lambda number=number: (x + number,))
        recording.replay()
        assert recording.outputs[0].tolist() == [1 + number] * 4
        recording = None
        gc.collect()
