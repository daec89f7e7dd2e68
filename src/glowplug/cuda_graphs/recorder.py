"""Records what a run launches on a GPU, as a CUDA graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch


class Recording(Protocol):
    """A recorded run.

    Attributes:
        outputs: what the run returned. Each replay writes to the same memory.
    """

    outputs: Sequence[Any]

    def replay(self) -> None:
        """Launch again what the run launched, on the current stream, with the same memory."""
        ...


class Recorder(Protocol):
    """Records runs."""

    def record(self, run: Callable[[], Sequence[Any]]) -> Recording:
        """Call a function and record what it launches. Nothing of that is executed.

        Raises:
            Exception: the function does something that can't be recorded, such as waiting for the GPU.
        """
        ...

    def memory(self) -> int:
        """Bytes of device memory that this process holds."""
        ...

    @property
    def budget(self) -> int:
        """Bytes of device memory that recordings may take."""
        ...

    def stream(self) -> Any:
        """What tells the current stream from others; None where there is only one."""
        ...

    def follow(self, stream: Any) -> None:
        """Let the current stream wait for what was launched on another."""
        ...


class _CudaRecording:
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Sequence[Any]) -> None:
        self.outputs = outputs
        self.replay = graph.replay


class CudaRecorder:
    """Records CUDA graphs, which share one memory pool.

    Args:
        device: the GPU.
    """

    _SHARE = 0.05
    """The share of the GPU's memory that recordings may take."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._recordings: weakref.WeakSet[_CudaRecording] = weakref.WeakSet()

    def record(self, run: Callable[[], Sequence[Any]]) -> Recording:
        """See `Recorder.record`."""
        before = torch.cuda.current_stream(self.device)
        graph = torch.cuda.CUDAGraph()
        if not self._recordings:  # a pool ends with its last graph, and can't be used again
            self._pool = torch.cuda.graph_pool_handle()
        try:
            # Other threads may go on to allocate memory meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = run()
        except BaseException:
            torch.cuda.set_stream(before)  # torch leaves its own in force
            self._recordings.clear()
            raise
        recording = _CudaRecording(graph, outputs)
        self._recordings.add(recording)
        return recording

    def memory(self) -> int:
        """See `Recorder.memory`."""
        return torch.cuda.memory_reserved(self.device)

    @property
    def budget(self) -> int:
        """See `Recorder.budget`."""
        return int(self._SHARE * torch.cuda.get_device_properties(self.device).total_memory)

    def stream(self) -> Any:
        """See `Recorder.stream`."""
        return torch.cuda.current_stream(self.device)

    def follow(self, stream: Any) -> None:
        """See `Recorder.follow`."""
        torch.cuda.current_stream(self.device).wait_stream(stream)


def recorder_for(device: torch.device) -> Recorder | None:
    """What records runs on a device; None where runs can't be recorded."""
    return CudaRecorder(device) if device.type == "cuda" and torch.version.cuda is not None else None
