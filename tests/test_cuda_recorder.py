"""How CUDA graphs share a memory pool, with stand-ins for torch's that follow its rules for pools."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from glowplug.cuda_graphs.recorder import CudaRecorder


class Pools:
    """The pools of a device. As in torch's allocator, one that had graphs and has none any more can't be used again."""

    def __init__(self) -> None:
        self.graphs: Counter[int] = Counter()
        self.ended: set[int] = set()
        self._numbers = itertools.count()

    def handle(self) -> int:
        """A new pool."""
        return next(self._numbers)

    def begin(self, pool: int) -> None:
        """A graph begins to use a pool."""
        if pool in self.ended:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        self.graphs[pool] += 1

    def end(self, pool: int) -> None:
        """A graph is gone."""
        self.graphs[pool] -= 1
        if not self.graphs[pool]:
            self.ended.add(pool)


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> Pools:
    """Stand-ins for torch's graphs."""
    made = Pools()

    class Graph:
        pool: int | None = None

        def replay(self) -> None:
            """Nothing to replay."""

        def __del__(self) -> None:
            if self.pool is not None:
                made.end(self.pool)

    @contextlib.contextmanager
    def graph(recorded: Graph, *, pool: int, capture_error_mode: str) -> Iterator[None]:
        made.begin(pool)
        recorded.pool = pool
        yield

    for name, value in {
        "CUDAGraph": Graph,
        "graph": graph,
        "graph_pool_handle": made.handle,
        "current_stream": lambda device: None,
        "set_stream": lambda stream: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def test_recordings_share_a_pool_and_outlive_it(pools: Pools) -> None:
    recorder = CudaRecorder(torch.device("cuda", 0))
    kept: list[Any] = [recorder.record(tuple), recorder.record(tuple)]
    assert set(pools.graphs.values()) == {2}
    kept.clear()  # as when a cache is gone, or weights have moved
    gc.collect()
    again = recorder.record(tuple)
    assert list(again.outputs) == [] and sum(pools.graphs.values()) == 1


def test_a_run_that_fails_leaves_the_others_alone(pools: Pools) -> None:
    recorder = CudaRecorder(torch.device("cuda", 0))
    first = recorder.record(tuple)
    fail: Callable[[], Any] = lambda: [][0]  # noqa: E731
    with pytest.raises(IndexError):
        recorder.record(fail)
    second = recorder.record(tuple)
    assert first is not second
    del first
    gc.collect()
    assert list(recorder.record(tuple).outputs) == []
