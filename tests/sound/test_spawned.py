"""Builds in a process of its own, as beside a GPU: it has the switches of the process that asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config
from transformers import AutoModelForCausalLM

import families
import glowplug

pytestmark = pytest.mark.inductor


@pytest.fixture(autouse=True)
def spawning(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process believe in a GPU, by which it does not fork; put its switches back."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    before = (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.use_deterministic_algorithms(before[1], warn_only=before[2])


def test_a_spawned_build_has_the_switches_of_its_parent(tmp_path: Path) -> None:
    original = families.build("qwen3", layers=2)
    original.save_pretrained(tmp_path / "model")
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True, warn_only=True)
    with inductor_config.patch({"cpp.min_chunk_size": 4000, "epilogue_fusion": False}):
        model = glowplug.from_pretrained(tmp_path / "model", cache_dir=tmp_path / "store", dtype=torch.float32)
    report = glowplug.report(model)
    assert report.elsewhere is not None
    assert (report.elsewhere.reason, report.start, report.fallbacks) == (None, "warm", [])
    ids = families.prompt(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grads", [True, False])
def test_a_spawned_build_takes_over_in_the_background(grads: bool, tmp_path: Path) -> None:
    model, same = families.build("qwen3", layers=2), families.build("qwen3", layers=2)
    same.load_state_dict(model.state_dict())
    model.requires_grad_(grads)
    torch.set_float32_matmul_precision("high")
    glowplug.compile(model, cache_dir=tmp_path / "store", background=True)
    ids = families.prompt(2, 6)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(ids).logits, same(ids).logits, rtol=1e-4, atol=1e-4)
            glowplug.settle(model, 300.0)
    report = glowplug.report(model)
    assert (report.start, report.programs, report.fallbacks) == ("warm", 1, [])


def test_what_differs_is_named_when_a_build_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = families.build("qwen3", layers=2)
    original.save_pretrained(tmp_path / "model")
    own = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        torch.set_float32_matmul_precision("high")  # while the build is under way
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        return own(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    model = glowplug.from_pretrained(tmp_path / "model", cache_dir=tmp_path / "store", dtype=torch.float32)
    report = glowplug.report(model)
    assert report.elsewhere is not None and report.elsewhere.reason is not None
    assert "matmul precision (highest there, high here)" in report.elsewhere.reason
    assert (report.start, report.programs, report.fallbacks) == ("cold", 1, [])
