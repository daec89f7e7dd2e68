"""The protocol of a front end: what knows one world's calls (transformers, plain modules), and what it hands on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from glowplug import cuda_graphs
from glowplug.background.job import Outcome
from glowplug.bodies import Forms, Group
from glowplug.graph.capture import Captured
from glowplug.graph.split import Step
from glowplug.layers.registry import LayerRegistry
from glowplug.layers.watch import Watch
from glowplug.options import Options
from glowplug.program import Candidate, Program
from glowplug.program.template import Template
from glowplug.report import Report
from glowplug.verify.check import Agree


class Call(Protocol):
    """One call, read."""

    @property
    def signature(self) -> Hashable:
        """What a program is made for; calls that differ in it need another."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        ...

    @property
    def cache(self) -> Any:
        """The cache of the call's sequence; None: the sequence ends with the call."""
        ...

    @property
    def has_begun(self) -> bool:
        """Whether it goes on with a sequence."""
        ...


@dataclass(frozen=True)
class Rung:
    """One rung of the ladder: a way of tracing a model.

    Attributes:
        stamped: trace a template and stamp it; otherwise the whole model.
        way: how the front end shows the model to the trace.
        again: tried only after a rung before it could not be traced.
    """

    stamped: bool
    way: str = ""
    again: bool = False


@dataclass(frozen=True)
class Target:
    """What to trace.

    Attributes:
        function: a function of tensors.
        examples: its example arguments.
        is_argument: whether a source is handed in at each call.
        varying: sources of the tensors whose sizes vary from call to call.
        check: may refuse the traced steps by raising.
        cut_at_layers: whether to cut the graph at the layers of the stack, too.
        is_unread: whether a source stands for a size in the trace, and is read by no run.
    """

    function: Callable[..., Any]
    examples: tuple[Any, ...]
    is_argument: Callable[[str], bool]
    varying: frozenset[str]
    check: Callable[[Sequence[Step], Captured], None]
    cut_at_layers: bool = False
    is_unread: Callable[[str], bool] = lambda source: False

    def sort(self, captured: Captured) -> tuple[dict[str, str], dict[str, Any]]:
        """Tell what is handed in at each call (graph value -> source) from what is bound (graph value -> object)."""
        arguments = {entry.node: entry.source for entry in captured.inputs if self.is_argument(entry.source)}
        # Other sizes are those of tensors in the program, which give them.
        rest = [entry for entry in captured.inputs if entry.node not in arguments and entry.type != "symint"]
        return arguments, {entry.node: entry.value for entry in rest}


class NotTracedError(Exception):
    """Dynamo can't trace a module; the message has its reason."""


class Builds(Protocol):
    """Background builds: other processes make a model's programs, one for each signature of its calls.

    Attributes:
        options: how the model is compiled; with a store.
    """

    options: Options

    def is_first(self, call: Any) -> bool:
        """Whether no call like this one was met before: nothing at all is done before the first answer."""
        ...

    def began(self, call: Any) -> bool:
        """Whether a build was begun for calls like this one."""
        ...

    def begin(self, call: Any) -> None:
        """Begin one, unless that was done."""
        ...

    def outcome(self, call: Any) -> Outcome | None:
        """What became of it; None while it is under way, or was not begun."""
        ...

    def wait(self, deadline: float) -> None:
        """Until all have ended, or the deadline (`time.monotonic()`) is over."""
        ...


class FrontEnd(Protocol):
    """What knows one world's calls.

    Attributes:
        model: the model.
        own: the forward that somebody put on the model before it was compiled; None for its class's.
        restarts: whether a model that changed is compiled again; otherwise it runs eagerly until it is changed back.
        smallest: the smallest size that may vary; calls with smaller ones are not served.
        most_programs: programs of a model, at most; None: one for each signature.
        about: what the model is, for the people who look into a store; None: its programs are not stored.
        experts: what happens to the experts, for the report.
        processes: those that run the model together; None: this one alone.
        device: where the model is.
        attend: see `ForwardContext`; None where layers attend by their own functions.
        guarded: runs a call by a full trace under Dynamo's guards, where no program serves:
            `guarded(registry, report, check_order, args, kwargs)`. None: the model's own forward runs.
            Raises `NotTracedError`.
    """

    model: Any
    own: Any
    restarts: bool
    smallest: int
    most_programs: int | None

    def __init__(self, model: Any, options: Options, own: Any = None) -> None: ...

    @property
    def about(self) -> str | None: ...

    @property
    def experts(self) -> str: ...

    @property
    def processes(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def attend(self) -> Callable[..., Any] | None: ...

    @property
    def guarded(self) -> Callable[..., Any] | None: ...

    @property
    def forward(self) -> Callable[..., Any]:
        """The model's forward as it was before it was compiled."""
        ...

    # -- calls ------------------------------------------------------------------------------------------------

    def unfit(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """Why no program can serve any call now, and the model's own forward must run."""
        ...

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A `Call`, or why no program can serve it."""
        ...

    def first_call(self) -> Any:
        """The `Call` that the model's first one will be like, or why that is not known."""
        ...

    def missing(self, arguments: Sequence[str], call: Any) -> str | None:
        """Fill in what a program's arguments read and the call leaves out; or why that can't be done."""
        ...

    def shapes(self, arguments: Sequence[str], call: Any) -> dict[str, tuple[int, ...]]:
        """Source -> shape of each tensor of a call."""
        ...

    def inputs(self, arguments: Sequence[str], call: Any) -> list[Any]:
        """What the sources of a program's arguments stand for in a call."""
        ...

    def step(self, call: Any) -> cuda_graphs.Step | None:
        """The call as a step that can be recorded in a CUDA graph; None if it can't."""
        ...

    def wrap(self, returns: Any, call: Any, outputs: Sequence[Any]) -> Any:
        """What the model's forward would return, from what a program returned."""
        ...

    # -- the model --------------------------------------------------------------------------------------------

    def register(self) -> LayerRegistry:
        """Register the layers that the model's ops ask for."""
        ...

    def followed(self) -> Iterable[nn.Module]:
        """Modules whose own forward runs at every call, behind an op: what they hold may change."""
        ...

    def changed(self, watch: Watch) -> str | None:
        """How the model differs from what was compiled, in a sentence; None when it does not."""
        ...

    def builds(self, report: Report) -> Builds | None:
        """The background builds of the model; None where there can be none."""
        ...

    # -- tracing ----------------------------------------------------------------------------------------------

    def rungs(self) -> Sequence[Rung]:
        """The ladder, from the top."""
        ...

    def climbed(self, rung: Rung, report: Report) -> None:
        """Report which rung gave a program."""
        ...

    def choose(self, read: Collection[str]) -> Template | None:
        """The template; None when the model is no deeper. `read`: attributes that traces have read.

        Raises:
            NotStampableError: the layers differ too much.
        """
        ...

    def target(self, call: Any, model: nn.Module, rung: Rung) -> Target:
        """What to trace of the model, or of a short model of its template."""
        ...

    def read_forms(self, captured: Captured, registry: LayerRegistry, call: Any) -> Forms:
        """How the opaque ops in a trace are called."""
        ...

    def groups(self, registry: LayerRegistry, forms: Forms) -> list[Group]:
        """The groups of layers whose op body is worth compiling."""
        ...

    def returns(self) -> Any:
        """What `wrap` needs to know, as far as it is known before the model was compared."""
        ...

    def rehearsal(self, call: Any, registry: LayerRegistry, *, check_order: bool) -> Callable[[Program], None] | None:
        """Begins the next comparison while forks compile the pieces of a program, given the program with uncompiled
        pieces; None if that is not worth it. Raises nothing: the comparison will."""
        ...

    def compare(
        self, candidate: Candidate, call: Any, registry: LayerRegistry, agree: Agree | None, *, check_order: bool
    ) -> tuple[str | None, Any]:
        """Compare a program with the model's own forward, if that is asked for; see `glowplug.verify.check.why_wrong`.

        Args:
            candidate: the program.
            call: a call that it is to serve.
            registry: the model's layers.
            agree: makes the finding of one process that of all.
            check_order: with `identity="ordered"`, whether a wrong order raises.

        Returns:
            Why it must not serve, or None; and what `wrap` needs to know.
        """
        ...

    # -- the store --------------------------------------------------------------------------------------------

    def facts(self, call: Any) -> dict[str, Any]:
        """What a program for calls like this one depends on, by name, besides options and the compiler.

        Raises:
            NotStorableError: the model can't be described.
        """
        ...

    def to_record(self, returns: Any, forms: Forms) -> dict[str, Any]:
        """What a later process needs besides the program, as plain values."""
        ...

    def from_record(self, facts: Mapping[str, Any]) -> tuple[Any, Forms]:
        """`returns` and the forms of a stored program; prepares the model for it."""
        ...
