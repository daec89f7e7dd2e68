"""The side stream of shared experts: one for each device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import families
import glowplug


class Stream:
    """Stands in for a stream, and counts."""

    made = 0

    def __init__(self, device: Any = None) -> None:
        type(self).made += 1

    def wait_stream(self, other: Any) -> None:
        """Nothing to wait for."""

    def record_event(self) -> None:
        """Nothing to record."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""


@contextlib.contextmanager
def no_stream(stream: Any) -> Iterator[None]:
    """Stands in for `torch.cuda.stream`."""
    yield


class Block(nn.Module):
    """A block with shared experts."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_experts = nn.Identity()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Nothing but the shape."""
        return torch.empty_like(hidden_states)


@pytest.mark.skipif(torch.cuda.is_available(), reason="beside a real stream")
def test_calls_share_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    current = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)
    monkeypatch.setattr(torch.cuda, "stream", no_stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    Stream.made = 0
    with FakeTensorMode():
        for _ in range(3):
            glowplug.moe_forward_shared(Block(), torch.empty(1, 4, 64, device="cuda"))
    assert Stream.made == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_calls_share_one_stream_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[int] = set()
    own = torch.cuda.stream

    def enter(stream: Any) -> Any:
        used.add(stream.cuda_stream)
        return own(stream)

    monkeypatch.setattr(torch.cuda, "stream", enter)
    block = next(m for m in families.build("glm4_moe").cuda().modules() if hasattr(m, "shared_experts"))
    with torch.no_grad():
        for _ in range(3):
            glowplug.moe_forward_shared(block, torch.randn(1, 4, 64, device="cuda"))
    assert len(used) == 1 and 0 not in used
