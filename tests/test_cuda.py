"""On a CUDA GPU: the same tokens as eager, opaque and inline, shared experts on a side stream. Skipped elsewhere."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import families
import glowplug
from glowplug.cuda_graphs.recorder import CudaRecorder
from glowplug.ops.moe import moe_forward_shared
from test_bodies import Uncompiled

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Eager and compiled matrix products alike in full float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


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


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "glm4_moe", "deepseek_v3"])
def test_forks_compile_every_piece(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """None of them calls the driver, for which this process would have to compile its piece."""
    model = families.build(family, layers=12).to("cuda", torch.bfloat16)
    glowplug.compile(model, experts="inline")
    with caplog.at_level(logging.DEBUG, logger="glowplug"), torch.no_grad():
        model(families.prompt(2, 5).cuda())
    assert glowplug.report(model).strategy == "stamped"
    assert "not compiled in a fork" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_with_sinks_runs_its_own_kernels(dtype: torch.dtype) -> None:
    eager, model = (families.build("gpt_oss").to("cuda", dtype) for _ in range(2))
    glowplug.compile(model, experts="inline", compiler=Uncompiled(), inside="compiled")
    for batch, tokens in ((1, 1), (2, 5), (3, 40)):
        ids = families.prompt(batch, tokens).cuda()
        with torch.no_grad():
            error = (model(ids).logits - eager(ids).logits).float().norm() / eager(ids).logits.float().norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.15)  # a router may choose another expert
    insides = glowplug.report(model).insides
    assert sum(len(inside.layers) for inside in insides) == model.config.num_hidden_layers
    assert all(inside.tokens != 0 for inside in insides)


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
