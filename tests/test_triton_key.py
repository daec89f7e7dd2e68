"""Triton's hash of itself, which stored pieces bring. Triton is a stand-in; `tests/test_cuda.py` has the real one."""

from __future__ import annotations

import sys
import threading
from types import ModuleType

import pytest

from glowplug.runtime.triton_key import TritonKey


class Cache(ModuleType):
    """Triton's module."""

    hashed = 0

    def triton_key(self) -> str:
        self.hashed += 1
        return "own"


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Cache:
    cache = Cache("triton.runtime.cache")
    runtime = ModuleType("triton.runtime")
    runtime.cache = cache  # type: ignore[attr-defined]
    for module in (ModuleType("triton"), runtime, cache):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return cache


def test_a_launch_takes_the_hash_of_the_first_piece(cache: Cache) -> None:
    key = TritonKey()
    key.learn("stored")
    key.learn("another")
    token = key.give()
    assert cache.triton_key() == "stored"
    elsewhere: list[str] = []
    thread = threading.Thread(target=lambda: elsewhere.append(cache.triton_key()))
    thread.start()
    thread.join()
    key.withdraw(token)
    assert (elsewhere, cache.triton_key(), cache.hashed) == (["own"], "own", 2)


def test_without_pieces_triton_hashes_itself(cache: Cache) -> None:
    key = TritonKey()
    key.learn(None)
    token = key.give()
    assert cache.triton_key() == "own"
    key.withdraw(token)
