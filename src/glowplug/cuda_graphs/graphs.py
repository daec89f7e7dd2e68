"""Runs decode steps of one model by CUDA graphs, each recorded at the second step of its form and replayed since.
A step over a cache of fixed extent is recorded whole; of a step over a growing cache, each piece between attention ops.

A replay repeats launches: it reads and writes the memory that the recorded run did, and runs no Python. So a recording
serves a step only if
- the program, its op bodies and the sizes of its inputs are those of the recording (its key);
- the cache's own code would do what it did then (the step's phase, in the key, too);
- every tensor that the run reads or writes still lies where it lay: inputs are copied into the recording's own, and the
  addresses of weights, buffers and the cache are compared at each step;
- the attributes of the layers whose own code runs in it are what they were, and so are torch's switches for kernels.
Otherwise the step runs without a graph, and the next one of its form is recorded anew.

`generate` makes a new cache at each call. So when a cache is gone, its recordings and its memory are kept for the next
cache of the same sizes, which takes that memory over.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glowplug.cuda_graphs.memory import MOST_STALE, Reads, addresses, copies_of, equal, key_of, own_of, switches
from glowplug.cuda_graphs.pieces import PieceGraphs
from glowplug.cuda_graphs.recorder import Recorder, Recording
from glowplug.cuda_graphs.steps import FixedStep, GrowingStep, Step
from glowplug.program import Program
from glowplug.reasons import why
from glowplug.report import Report
from glowplug.runtime.forks import make_lock

_MOST = 64
"""How many forms of steps are remembered for one cache."""


RunProgram = Callable[[Program, Any, Sequence[Any]], Any]
"""Runs a program, given the cache and the inputs."""
_Run = Callable[[Any, Sequence[Any]], Any]
"""The same of one program."""


@dataclass
class _Form:
    """Steps of one form.

    Attributes:
        held: what the form's key names by its id.
        recording: their recording, once there is one.
        inputs: the recording's own inputs.
        read: what a run may read of the model.
        attributes: the attributes that its layers had.
        addresses: where the tensors of the model and the cache lay.
        size: bytes of device memory that the recording takes.
        stale: how often a recording went stale.
        refused: whether steps of this form run without a graph for good.
    """

    held: tuple[Any, ...]
    recording: Recording | None = None
    inputs: tuple[Any, ...] = ()
    read: Reads | None = None
    attributes: tuple[dict[str, Any], ...] = ()
    addresses: tuple[Any, ...] = ()
    size: int = 0
    stale: int = 0
    refused: bool = False

    def drop(self) -> None:
        """Give up the recording."""
        self.recording, self.inputs, self.read, self.attributes, self.addresses, self.size = None, (), None, (), (), 0


@dataclass
class _Group:
    """The recordings over the memory of one cache.

    Attributes:
        owner: gives the cache; None once it is gone.
        tensors: its tensors.
        forms: key -> steps of one form.
    """

    owner: weakref.ref[Any]
    tensors: tuple[Tensor, ...]
    forms: dict[Hashable, _Form] = field(default_factory=dict)

    @property
    def is_idle(self) -> bool:
        """Whether its cache is gone."""
        return self.owner() is None

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether a cache with these tensors can take over the memory of this one."""
        return list(map(key_of, self.tensors)) == list(map(key_of, tensors))


class CudaGraphs:
    """The recordings of one model.

    Args:
        recorder: records runs.
        reads: gives what a run may read of the model now.
        report: receives what is recorded.
    """

    def __init__(self, recorder: Recorder, reads: Callable[[], Reads], report: Report) -> None:
        self._recorder = recorder
        self._reads = reads
        self._report = report
        self._lock = make_lock()
        self._groups: dict[int, _Group] = {}
        self._pieces: PieceGraphs | None = None
        self._stream: Any = None

    def run(
        self, step: Step, program: Program, held: tuple[Any, ...], inputs: Sequence[Any], run: RunProgram
    ) -> list[Any] | None:
        """What a step returns, by replays; None if it must run without a graph.

        Args:
            step: the step.
            program: the program.
            held: what else is run, such as op bodies. Compared by identity.
            inputs: the inputs of the program: tensors on the device, and numbers.
            run: runs a program, given the cache and the inputs.
        """
        with self._lock:
            if step.grows:
                return self._run_pieces(step, program, inputs, run)
            held = (program, *held)
            group = self._group(step)
            key = (step.phase, switches(), *map(id, held), *map(key_of, inputs))
            form = group.forms.get(key)
            if form is None:  # its first step sets up what a recording can't: libraries, kernels that are tuned
                if len(group.forms) < _MOST:
                    group.forms[key] = _Form(held)
                return None
            if form.refused or not self._is_current(form, group, step, inputs, functools.partial(run, program)):
                return None
            return self._replay(form, step, inputs)

    def _run_pieces(
        self, step: GrowingStep, program: Program, inputs: Sequence[Any], run: RunProgram
    ) -> list[Any] | None:
        """The same for a step over a growing cache."""
        if self._pieces is None or self._pieces.program is not program:
            self._pieces = PieceGraphs(program, self._recorder, self._reads(), self._report)
        if not self._pieces.begin((switches(), step.sizes)):
            return None
        self._follow()
        outputs = run(self._pieces.wrapped, step.cache, inputs)
        return copies_of(outputs)

    def _group(self, step: FixedStep) -> _Group:
        """The recordings for the cache of a step: its own, or those of a cache that is gone."""
        number = id(step.cache)
        group = self._groups.get(number)
        if group is not None and group.owner() is step.cache:
            return group
        tensors = tuple(step.tensors)
        idle = [group for group in self._groups.values() if group.is_idle]
        group = next((group for group in idle if group.fits(tensors)), None)
        self._groups = {key: group for key, group in self._groups.items() if not group.is_idle}
        owner = weakref.ref(step.cache, functools.partial(_owner_gone, weakref.ref(self), number))
        if group is None:
            group = _Group(owner, tensors)
        else:
            group.owner = owner
            with torch.inference_mode(False), torch.no_grad():
                for held, new in zip(group.tensors, tensors, strict=True):
                    held.copy_(new)
            step.rebind(group.tensors)
        self._groups[number] = group
        return group

    def owner_gone(self, number: int) -> None:
        """The cache of a group is gone: keep the group for the next one, unless its memory is too much for that."""
        group = self._groups.get(number)
        if group is not None and group.is_idle and sum(t.nbytes for t in group.tensors) > self._recorder.budget:
            self._groups.pop(number, None)

    def _is_current(
        self,
        form: _Form,
        group: _Group,
        step: FixedStep,
        inputs: Sequence[Any],
        run: _Run,
    ) -> bool:
        """Whether a form has a recording that serves a step. Records one where there is none."""
        if form.recording is None:
            group.tensors = tuple(step.tensors)
            return self._record(form, step, inputs, run)
        assert form.read is not None
        if form.addresses == addresses(step.tensors, form.read) and equal(form.read.attributes, form.attributes):
            return True
        form.drop()
        form.stale += 1
        if form.stale >= MOST_STALE:
            self._refuse(form, "weights or the cache move from step to step")
        return False

    def _record(self, form: _Form, step: FixedStep, inputs: Sequence[Any], run: _Run) -> bool:
        if self._size() >= self._recorder.budget:
            self._refuse(form, f"others already take {self._size() >> 20} MiB of memory")
            return False
        begin, before = time.perf_counter(), self._recorder.memory()
        try:
            with torch.inference_mode(False), torch.no_grad():
                own = tuple(map(own_of, inputs))
                read = self._reads()
                recording = self._recorder.record(lambda: run(step.recordable(), own))
        except Exception as exc:  # whatever can't be recorded can be run
            self._refuse(form, why(exc))
            return False
        form.recording, form.inputs, form.read = recording, own, read
        form.attributes, form.addresses = tuple(map(dict, read.attributes)), addresses(step.tensors, read)
        form.size = max(self._recorder.memory() - before, 0)
        self._report.cuda_graphs.add(time.perf_counter() - begin, self._size())
        return True

    def _size(self) -> int:
        return sum(form.size for group in self._groups.values() for form in group.forms.values())

    def _refuse(self, form: _Form, reason: str) -> None:
        form.drop()
        form.refused = True
        self._report.fall_back(f"a step is recorded in no CUDA graph: {reason}", to="launches")

    def _replay(self, form: _Form, step: FixedStep, inputs: Sequence[Any]) -> list[Any]:
        assert form.recording is not None
        self._follow()
        with torch.no_grad():
            for own, value in zip(form.inputs, inputs, strict=True):
                if isinstance(own, Tensor):
                    own.copy_(value)
            form.recording.replay()
            step.advance()
            return copies_of(form.recording.outputs)

    def _follow(self) -> None:
        """Let this step run after the one before, on whatever stream that was."""
        stream = self._recorder.stream()
        if self._stream is not None and self._stream != stream:
            self._recorder.follow(self._stream)
        self._stream = stream


def _owner_gone(graphs: weakref.ref[CudaGraphs], number: int, _: Any) -> None:
    held = graphs()
    if held is not None:
        held.owner_gone(number)
