"""The front end of plain modules: any `nn.Module` whose forward takes and returns tensors, with layer ops or without.

What can't be stamped is traced in full by `torch.compile` with glowplug's backend, where Dynamo's guards stay in force.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from glowplug.backend import glowplug_backend
from glowplug.bodies import Forms, Group
from glowplug.compilers import get_compiler, why_unable
from glowplug.errors import GlowplugError, NotStampableError
from glowplug.front import NotTracedError, Rung, Target
from glowplug.frontends.plain.calls import PlainCall, argument, examples, read_plain, traced_function
from glowplug.graph.capture import Captured
from glowplug.graph.sources import named
from glowplug.graph.split import Step
from glowplug.layers.context import ForwardContext, forward_context
from glowplug.layers.copies import make_twin
from glowplug.layers.registry import LayerRegistry, register_layers
from glowplug.layers.stack import find_repetition
from glowplug.layers.watch import Watch
from glowplug.ops import order_layers
from glowplug.options import Options
from glowplug.program import Candidate, Program
from glowplug.program import template as templates
from glowplug.program.template import Template
from glowplug.ready import run_program
from glowplug.reasons import describe_break, raised_by_tracer, why
from glowplug.report import Report
from glowplug.runtime.fitness import unfit
from glowplug.runtime.quiet import RETRACED, quiet_log, quiet_traces
from glowplug.verify.check import Agree, Case, why_wrong

try:
    from torch._dynamo.exc import TorchDynamoException
    from torch._dynamo.utils import counters as _dynamo_counters
    from torch._dynamo.utils import graph_break_reasons as _breaks
except ImportError:  # pragma: no cover - private; checked on torch 2.11 and 2.13. Without it, breaks go unreported.
    TorchDynamoException = ()
    _dynamo_counters, _breaks = {}, []

_DEEP = 4
"""A stack of more layers, whose classes repeat, needs a reason not to be stamped."""
_entries = itertools.count()


@dataclass(frozen=True)
class Returns:
    """What a module returns.

    Attributes:
        form: its structure.
        places: for each leaf, which output of the program it is: a tensor may occur twice.
    """

    form: Any
    places: tuple[int, ...]

    @classmethod
    def read(cls, output: Any) -> tuple[Returns, list[Any]]:
        """Read an output; returns its distinct leaves, too."""
        leaves, form = pytree.tree_flatten(output)
        distinct = list({id(leaf): leaf for leaf in leaves}.values())
        numbers = {id(leaf): number for number, leaf in enumerate(distinct)}
        return cls(form, tuple(numbers[id(leaf)] for leaf in leaves)), distinct


class PlainFrontEnd:
    """See `FrontEnd`.

    Args:
        model: any module whose forward takes and returns tensors.
        options: how to compile it; `experts` has no meaning here.
        own: the forward that somebody put on the module before it was compiled. It is traced in full: what is bound to
            this very module can't be stamped.
    """

    restarts = True
    smallest = 2
    most_programs: int | None = 8
    about = None
    experts = "none"
    processes = None
    attend = None

    def __init__(self, model: nn.Module, options: Options, own: Callable[..., Any] | None = None) -> None:
        self.model = model
        self.options = options
        self.own = own
        self._compiled: dict[int, Callable[..., Any]] = {}

    # -- calls ------------------------------------------------------------------------------------------------

    @property
    def forward(self) -> Callable[..., Any]:
        """See `FrontEnd.forward`."""
        return self.own if self.own is not None else type(self.model).forward.__get__(self.model)

    def unfit(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """See `FrontEnd.unfit`."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*self.model.parameters(), *tensors)):
            return "grad mode is on and the module's weights need gradients; run under torch.no_grad()"
        return self._unfit

    @functools.cached_property
    def _unfit(self) -> str | None:
        return unfit(self.model) or why_unable(get_compiler(self.options.compiler), self.device.type)

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PlainCall | str:
        """See `FrontEnd.read`."""
        return "" if self.model.training else read_plain(args, kwargs)

    def first_call(self) -> str:
        """See `FrontEnd.first_call`: nobody knows it."""
        return "a plain module has no first call"

    def missing(self, arguments: Sequence[str], call: PlainCall) -> str | None:
        """See `FrontEnd.missing`: nothing is."""
        return None

    def shapes(self, arguments: Sequence[str], call: PlainCall) -> dict[str, tuple[int, ...]]:
        """See `FrontEnd.shapes`."""
        return call.shapes()

    def inputs(self, arguments: Sequence[str], call: PlainCall) -> list[Any]:
        """See `FrontEnd.inputs`."""
        return list(map(call.value, arguments))

    def step(self, call: PlainCall) -> None:
        """See `FrontEnd.step`: nothing is known of a module's cache."""

    def wrap(self, returns: Returns, call: PlainCall, outputs: Sequence[Any]) -> Any:
        """See `FrontEnd.wrap`."""
        return pytree.tree_unflatten([outputs[place] for place in returns.places], returns.form)

    # -- the module -------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """See `FrontEnd.device`."""
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    def register(self) -> LayerRegistry:
        """See `FrontEnd.register`."""
        registry = register_layers(self.model, identity=self.options.resolved_identity)
        order_layers(registry)
        return registry

    def followed(self) -> tuple[nn.Module, ...]:
        """See `FrontEnd.followed`."""
        return ()

    def changed(self, watch: Watch) -> str | None:
        """See `FrontEnd.changed`."""
        return watch.change()

    def builds(self, report: Report) -> None:
        """See `FrontEnd.builds`: there are none."""

    # -- tracing ----------------------------------------------------------------------------------------------

    def rungs(self) -> Sequence[Rung]:
        """See `FrontEnd.rungs`."""
        stamps = self.options.stamp != "off" and self.options.resolved_identity == "hoisted"
        return [Rung(stamped=True)] if stamps else []

    def climbed(self, rung: Rung, report: Report) -> None:
        """See `FrontEnd.climbed`."""

    def choose(self, read: Collection[str]) -> Template | None:
        """See `FrontEnd.choose`."""
        if self.own is not None:
            raise NotStampableError(
                "before it was compiled the module was given a forward of its own, which is traced as it is; compile "
                "the module first, then wrap module.forward"
            )
        stack = find_repetition(self.model, read)
        return templates.choose(stack, _DEEP) if stack is not None else None

    def target(self, call: PlainCall, model: nn.Module, rung: Rung) -> Target:
        """See `FrontEnd.target`."""
        return Target(
            traced_function(call),
            (model, examples(call)),
            is_argument=lambda source: argument(source) is not None,
            varying=frozenset(call.shapes()),
            check=_check,
            cut_at_layers=True,
        )

    def read_forms(self, captured: Captured, registry: LayerRegistry, call: PlainCall) -> Forms:
        """See `FrontEnd.read_forms`."""
        return {}

    def groups(self, registry: LayerRegistry, forms: Forms) -> list[Group]:
        """See `FrontEnd.groups`."""
        return []

    def returns(self) -> None:
        """See `FrontEnd.returns`: known once the module was compared."""

    # -- checking ---------------------------------------------------------------------------------------------

    def rehearsal(self, call: PlainCall, registry: LayerRegistry, *, check_order: bool) -> None:
        """See `FrontEnd.rehearsal`: the comparison needs twins of the module."""

    def compare(
        self, candidate: Candidate, call: PlainCall, registry: LayerRegistry, agree: Agree | None, *, check_order: bool
    ) -> tuple[str | None, Returns]:
        """See `FrontEnd.compare`: on twins of the module, as it may have a state of its own."""
        assert candidate.traced is not None
        built = candidate.traced.built
        expected, twin = make_twin(self.model), make_twin(self.model)
        arguments, copies = ([tensor.clone() for tensor in call.tensors] for _ in range(2))
        args, kwargs = call.rebuild(arguments)
        with torch.no_grad(), forward_context(ForwardContext(expected.registry)):
            output = type(expected.model).forward(expected.model, *args, **kwargs)
        returns, leaves = Returns.read(output)
        if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise NotStampableError("the module returns something besides tensors")
        if self.options.verify == "off":
            return None, returns

        def run(program: Program) -> Any:
            outputs = run_program(self, program, replace(call, tensors=tuple(copies)), ForwardContext(twin.registry))
            return {"output": list(outputs), "arguments afterwards": copies, "state": twin.state}

        wanted = {"output": leaves, "arguments afterwards": arguments, "state": expected.state}
        program = built.for_copy(twin.model, twin.registry, twin.of)
        graphs = program.with_slots(built.graphs)
        return why_wrong(program, graphs, [Case("this call", wanted, run)], agree), returns

    # -- the store --------------------------------------------------------------------------------------------

    def facts(self, call: PlainCall) -> dict[str, Any]:
        """See `FrontEnd.facts`: programs of plain modules are not stored."""
        return {}

    def to_record(self, returns: Returns, forms: Forms) -> dict[str, Any]:
        """See `FrontEnd.to_record`."""
        return {}

    def from_record(self, facts: Mapping[str, Any]) -> tuple[None, Forms]:
        """See `FrontEnd.from_record`."""
        return None, {}

    # -- in full ----------------------------------------------------------------------------------------------

    def guarded(
        self, registry: LayerRegistry, report: Report, check_order: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """See `FrontEnd.guarded`."""
        run = self._compiled.get(registry.scope)
        if run is None:
            run = self._compiled[registry.scope] = self._compile(report)
        breaks, places = dict(_dynamo_counters.get("graph_break", {})), len(_breaks)
        programs = report.programs
        with quiet_log() as lines, _guard_hooks(), forward_context(ForwardContext(registry, None, check_order)):
            try:
                output = run(*args, **kwargs)
            except Exception as exc:
                cause = _glowplug_cause(exc)
                if cause is not None:
                    raise cause from exc
                if not (isinstance(exc, TorchDynamoException) or raised_by_tracer(exc)):
                    raise
                raise NotTracedError(why(exc)) from exc
        if report.programs != programs and report.strategy != "stamped":
            report.strategy = self.options.resolved_identity
        if any(line.startswith(RETRACED) for line in lines):
            limit = torch._dynamo.config.recompile_limit
            report.fall_back(
                f"torch.compile traced the module {limit} times, each time for other arguments or attributes, and runs "
                "what it has not traced by now eager; keep what changes in a tensor"
            )
        found = [r for r, n in _dynamo_counters.get("graph_break", {}).items() if n > breaks.get(r, 0)]
        if found or report.programs > programs + 1:
            at = _breaks[places] if len(_breaks) > places else None
            if at is not None:
                reason = describe_break(at.reason, at.user_stack)
            else:
                reason = describe_break(found[0]) if found else ""
            reason = f": {reason}" if reason else ""
            report.fall_back(f"Dynamo broke the graph, and ran the rest eager or apart{reason}")
        return output

    def _compile(self, report: Report) -> Callable[..., Any]:
        settings: dict[str, Any] = {
            "compiler": self.options.compiler,
            "report": report,
            "strict": self.options.strict,
        }
        quiet_traces()
        entry = _entry(self.model, self.own)
        return torch.compile(entry, backend=glowplug_backend, options=settings, fullgraph=self.options.strict)


def _check(steps: Sequence[Step], captured: Captured) -> None:
    """Refuse a trace that depends on what no call gives."""
    for entry in captured.inputs:
        if entry.type == "symint" and argument(entry.source) is None:
            raise NotStampableError(f"the trace depends on a size that no argument has: {named(entry.source)}")


def _guard_hooks() -> Any:
    """Make Dynamo notice hooks that are added to a module later; by default it does not look."""
    return torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)


def _entry(model: nn.Module, own: Callable[..., Any] | None) -> types.FunctionType:
    """A function that runs the module's own forward, with a code object and a name of its own: Dynamo counts
    recompilations by code object, and remembers by name which sizes varied; other modules' must not count here."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs) if own is not None else type(model).forward(model, *args, **kwargs)

    code = run.__code__.replace(co_name=f"run_{next(_entries)}")
    return types.FunctionType(code, run.__globals__, run.__name__, None, run.__closure__)


def _glowplug_cause(exc: BaseException | None) -> GlowplugError | None:
    """An error of glowplug's own that Dynamo wrapped."""
    while exc is not None:
        if isinstance(exc, GlowplugError):
            return exc
        exc = getattr(exc, "inner_exception", None) or exc.__cause__
    return None
