"""The pieces of a decode step over a growing cache, each as a CUDA graph: attention and the cache run between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from glowplug.cuda_graphs.memory import MOST_STALE, Reads, addresses, key_of, own_of
from glowplug.cuda_graphs.recorder import Recorder, Recording
from glowplug.program import Program
from glowplug.reasons import why
from glowplug.report import Report

_MOST = 16
"""How many sizes of steps are recorded."""


class PieceGraphs:
    """A program whose pieces are recorded and replayed.

    Args:
        program: the program.
        recorder: records runs.
        reads: what the program may read of the model.
        report: receives what is recorded.

    Attributes:
        wrapped: the same program, which replays its pieces.
        recorder, report: as above.
        sizes: the sizes of the step under way.
        bound: ids of the tensors that the program is bound to.
        fixed: addresses of the outputs of recordings.
    """

    def __init__(self, program: Program, recorder: Recorder, reads: Reads, report: Report) -> None:
        self.program, self.recorder, self.report = program, recorder, report
        self.sizes: Hashable = None
        self.fixed: set[int] = set()
        self._reads = reads
        self._known: dict[Hashable, bool] = {}
        self._pieces: list[_Piece] = []
        self._stale = 0
        self._held = 0
        self.wrapped = program.wrapped(self._wrap)
        self.bound = {id(leaf) for leaf in pytree.tree_leaves(dict(self.wrapped.names)) if isinstance(leaf, Tensor)}
        self._addresses = addresses((), reads)

    def _wrap(self, index: int, run: Callable[..., Any]) -> _Piece:
        self._pieces.append(_Piece(self, run))
        return self._pieces[-1]

    def begin(self, sizes: Hashable) -> bool:
        """Begin a step of these sizes; whether `wrapped` is to run it."""
        self.sizes = sizes
        if self._addresses != addresses((), self._reads):
            self._addresses = addresses((), self._reads)
            self._stale += 1
            self._known.clear()
            self.fixed.clear()
            for piece in self._pieces:
                piece.forms.clear()
        if self._stale >= MOST_STALE or self._held >= self.recorder.budget:
            return False
        if sizes not in self._known:  # the first step sets up what a recording can't
            if len(self._known) < _MOST:
                self._known[sizes] = True
            return False
        return True

    def record(self, run: Callable[[], Any]) -> Recording | None:
        """Record a piece; None if that can't be done."""
        begin, before = time.perf_counter(), self.recorder.memory()
        try:
            with torch.inference_mode(False), torch.no_grad():
                recording = self.recorder.record(run)
        except Exception as exc:  # whatever can't be recorded can be run
            self.report.fall_back(f"a piece is recorded in no CUDA graph: {why(exc)}", to="launches")
            return None
        self._held += max(self.recorder.memory() - before, 0)
        self.report.cuda_graphs.add(time.perf_counter() - begin, self._held)
        self.fixed |= {leaf.data_ptr() for leaf in recording.outputs if isinstance(leaf, Tensor)}
        return recording


@dataclass(frozen=True)
class _Form:
    """A recording of a piece.

    Attributes:
        recording: the recording; None if it can't be recorded.
        varying: (position, own memory) of the tensors that differ from step to step.
        keys: what each of these may not differ in.
        others: (position, value) of the arguments that are no tensors.
    """

    recording: Recording | None
    varying: tuple[tuple[int, Tensor], ...] = ()
    keys: tuple[Hashable, ...] = ()
    others: tuple[tuple[int, Any], ...] = ()

    def serves(self, args: Sequence[Any]) -> bool:
        """Whether a replay gives what the piece would."""
        for (position, _), key in zip(self.varying, self.keys, strict=True):
            if key_of(args[position]) != key:
                return False
        return all(args[position] == value for position, value in self.others)


class _Piece:
    """One step of a program.

    Args:
        graphs: the program's.
        run: the piece.
    """

    def __init__(self, graphs: PieceGraphs, run: Callable[..., Any]) -> None:
        self._graphs, self._run = graphs, run
        self.forms: dict[Hashable, _Form] = {}

    def __call__(self, *args: Any) -> Any:
        form = self.forms.get(self._graphs.sizes)
        if form is None:
            form = self.forms[self._graphs.sizes] = self._record(args)
        if form.recording is None or not form.serves(args):
            return self._run(*args)
        for position, own in form.varying:
            value = args[position]
            if value.data_ptr() != own.data_ptr():
                own.copy_(value)
        form.recording.replay()
        return form.recording.outputs

    def _record(self, args: Sequence[Any]) -> _Form:
        graphs = self._graphs
        own = list(args)
        varying: list[tuple[int, Tensor]] = []
        with torch.inference_mode(False), torch.no_grad():
            for position, value in enumerate(args):
                if isinstance(value, Tensor) and id(value) not in graphs.bound:
                    # The output of another recording lies where it lies; anything else is copied.
                    own[position] = value if value.data_ptr() in graphs.fixed else own_of(value)
                    varying.append((position, own[position]))
        recording = graphs.record(lambda: self._run(*own))
        keys = tuple(key_of(args[position]) for position, _ in varying)
        others = tuple((position, value) for position, value in enumerate(args) if not isinstance(value, Tensor))
        return _Form(recording, tuple(varying), keys, others)
