"""The time of calls on a GPU, for the benchmarks beside this file."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator

import torch


def microseconds(calls: Callable[[], Iterator[object]], count: int, repeats: int = 9) -> float:
    """The median time of a call, in a CUDA graph of several.

    Args:
        calls: makes the calls, one after the other.
        count: how many these are.
        repeats: how often the graph is timed.
    """
    for _ in itertools.islice(calls(), 2):
        pass
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in calls():
            pass
    graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) * 1000 / count
