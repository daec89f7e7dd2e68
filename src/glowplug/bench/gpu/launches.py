"""Counts the kernels that a decode step runs on a GPU, and the launches by which the host starts them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from glowplug.bench.gpu.decoding import WARM_UP, Clock, Decoder

_STEPS = 4
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cuGraphLaunch")


def count_launches(decoder: Decoder, ids: Tensor, layers: int) -> dict[str, float]:
    """What a token of `generate` over a static cache launches, its choice included.

    Returns:
        kernels: those that a step runs on the GPU; kernels_a_layer: the same divided by `layers`; host_launches: the
        launches of single kernels and of graphs.

    Raises:
        RuntimeError: the profiler saw no kernel.
    """
    profiler = profile(activities=[ProfilerActivity.CUDA])

    def on_token(count: int) -> None:
        if count == WARM_UP:
            profiler.start()
        elif count == WARM_UP + _STEPS:
            profiler.stop()

    decoder.generate(ids, Clock(WARM_UP + _STEPS, on_token=on_token))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        kernels, launches = count_events(json.loads(path.read_text(errors="replace"))["traceEvents"])
    if not kernels:
        raise RuntimeError("the profiler saw no kernel on the GPU")
    return {
        "kernels": round(kernels / _STEPS, 1),
        "kernels_a_layer": round(kernels / _STEPS / layers, 2),
        "host_launches": round(launches / _STEPS, 1),
    }


def count_events(events: list[dict[str, Any]]) -> tuple[int, int]:
    """The kernels and the host's launches among the events of a trace. Copies and fills of memory are neither."""
    kernels = sum(event.get("cat") == "kernel" for event in events)
    calls = [event["name"] for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    return kernels, sum(name.startswith(_LAUNCHES) for name in calls)
