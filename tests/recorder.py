"""Recorders that count what they do: CUDA's own, and one that works as CUDA graphs do on any device.

What that one records is not executed, and a replay repeats the recorded operations on the very same memory, without any
Python around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from glowplug.cuda_graphs.recorder import CudaRecorder, Recording


class _Tape(TorchDispatchMode):
    """Executes operations, notes them, and undoes what they wrote to memory that was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for place, declared in enumerate(func._schema.arguments):
            if declared.is_write:
                value = args[place] if place < len(args) else kwargs.get(declared.name)
                self.before += [(t, t.clone()) for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
        returned = func(*args, **kwargs)
        # A recording knows memory alone: it does not see when a tensor is given other memory later.
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        self.calls.append((func, args, kwargs, pytree.tree_map_only(Tensor, Tensor.detach, returned)))
        return returned

    def undo(self) -> None:
        """Give memory back what it held."""
        for tensor, content in reversed(self.before):
            tensor.copy_(content)


class TapeRecording:
    """See `glowplug.cuda_graphs.Recording`."""

    def __init__(self, calls: list[tuple[Any, Any, Any, Any]], outputs: Sequence[Any]) -> None:
        self._calls = calls
        self.outputs = outputs
        self.replays = 0

    def replay(self) -> None:
        """Repeat the operations."""
        self.replays += 1
        for func, args, kwargs, returned in self._calls:
            own = [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]
            given = {leaf.untyped_storage().data_ptr() for leaf in pytree.tree_leaves((args, kwargs)) if _is(leaf)}
            again = func(*args, **kwargs)
            for held, new in zip(own, filter(_is, pytree.tree_leaves(again)), strict=True):
                if held.untyped_storage().data_ptr() not in given:  # neither a view nor written in place
                    held.copy_(new)


def _is(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


class TapeRecorder:
    """See `glowplug.cuda_graphs.Recorder`.

    Attributes:
        recordings: all of them.
        budget: bytes that recordings may take; each takes a thousand.
    """

    def __init__(self, budget: int = 1 << 30) -> None:
        self.recordings: list[TapeRecording] = []
        self.attempts = 0
        self.budget = budget

    def record(self, run: Callable[[], Sequence[Any]]) -> TapeRecording:
        """Record what a function does."""
        self.attempts += 1
        tape = _Tape()
        try:
            with tape:
                outputs = run()
        finally:
            tape.undo()
        self.recordings.append(TapeRecording(tape.calls, outputs))
        return self.recordings[-1]

    def memory(self) -> int:
        """A thousand bytes for each."""
        return 1000 * len(self.recordings)

    def stream(self) -> Any:
        """There is one."""
        return

    def follow(self, stream: Any) -> None:
        """Nothing to wait for."""

    @property
    def replays(self) -> int:
        """How many steps were replayed."""
        return sum(recording.replays for recording in self.recordings)


class _CountedRecording:
    """A recording that counts its replays."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self.outputs = recording.outputs
        self.replays = 0

    def replay(self) -> None:
        """Replay it."""
        self.replays += 1
        self._recording.replay()


class RealRecorder(CudaRecorder):
    """CUDA's own. Its memory is counted as that of the tape.

    Attributes:
        recordings, budget: as those of `TapeRecorder`.
    """

    budget = 1 << 30

    def __init__(self) -> None:
        super().__init__(torch.device("cuda", 0))
        self.recordings: list[_CountedRecording] = []
        self.attempts = 0

    def record(self, run: Callable[[], Sequence[Any]]) -> Recording:
        """Record what a function launches."""
        self.attempts += 1
        self.recordings.append(_CountedRecording(super().record(run)))
        return self.recordings[-1]

    def memory(self) -> int:
        """A thousand bytes for each."""
        return 1000 * len(self.recordings)

    @property
    def replays(self) -> int:
        """How many steps were replayed."""
        return sum(recording.replays for recording in self.recordings)
