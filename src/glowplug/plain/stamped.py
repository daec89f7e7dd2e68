"""Stamps a plain module: traces its template for each signature of calls, and compares the program on a twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from glowplug.collector import collector_paused
from glowplug.compilers import PieceCompiler, warm_up
from glowplug.errors import (
    AttributesReadError,
    CaptureError,
    CompileError,
    GlowplugError,
    LayerLookupError,
    NotServableError,
    NotStampableError,
)
from glowplug.forks import make_lock
from glowplug.graph.capture import Captured, capture
from glowplug.graph.shapes import ShapeAssumptions, read_assumptions
from glowplug.layers.context import ForwardContext, forward_context
from glowplug.layers.registry import LayerRegistry
from glowplug.layers.stack import find_repetition
from glowplug.layers.watch import Watch
from glowplug.options import Options
from glowplug.plain.calls import SOURCE, PlainCall, examples, read_plain, traced_function
from glowplug.plain.twin import differs, make_twin, states_differ
from glowplug.program import Built, PieceCache, Program, build_program, with_arrived
from glowplug.program import template as templates
from glowplug.program.template import Template
from glowplug.reasons import named, said
from glowplug.report import Report

_PROGRAMS = 8
"""Programs of one module, at most; the calls that none of them serves are traced in full."""
_DEEP = 4
"""A stack of more layers, whose classes repeat, needs a reason not to be stamped."""


@dataclass
class Stamped:
    """A program of one signature, and what its calls must fulfil.

    Attributes:
        program: the program.
        assumptions: what its trace assumed of sizes.
        returns: what the module returns.
    """

    program: Program
    assumptions: ShapeAssumptions
    returns: Returns

    def serves(self, call: PlainCall) -> bool:
        """Whether the sizes of a call are such as the program was made and compared for."""
        shapes = call.shapes()
        if self.assumptions.broken_by(shapes) is not None:
            return False
        for source, dims in self.assumptions.dims.items():
            if any(not isinstance(dim, int) and size < 2 for dim, size in zip(dims, shapes[source], strict=True)):
                return False
        return True

    def run(self, call: PlainCall, context: ForwardContext) -> Any:
        """Run a call."""
        self.program = with_arrived(self.program)
        return self.returns.build(run_flat(self.program, call, context))


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

    def build(self, flat: list[Any]) -> Any:
        """The output, from what a program returned."""
        return pytree.tree_unflatten([flat[place] for place in self.places], self.form)


def run_flat(program: Program, call: PlainCall, context: ForwardContext) -> list[Any]:
    """Run a program on a call; what it returns is flat."""
    with torch.no_grad(), forward_context(context):
        return list(program.run(*map(call.value, program.arguments)))


class Stamper:
    """Stamps one plain module.

    Args:
        model: the module.
        registry: its layers.
        options: how to compile it.
        compiler: compiles pieces.
        report: receives everything that happens.
    """

    def __init__(
        self, model: nn.Module, registry: LayerRegistry, options: Options, compiler: PieceCompiler, report: Report
    ) -> None:
        self.model = model
        self.registry = registry
        self.options = options
        self.compiler = compiler
        self.report = report
        self._lock = make_lock()
        self._pieces = PieceCache()
        self._reads: set[str] = set()
        self._watch: Watch | None = None
        self._programs: dict[Any, list[Stamped]] = {}
        self._told: set[str] = set()
        self._template = self._choose()

    def _choose(self) -> Template | None:
        if self.options.stamp == "off" or self.options.resolved_identity != "hoisted" or self.model.training:
            return None
        stack = find_repetition(self.model, self._told)
        try:
            return templates.choose(stack, _DEEP) if stack is not None else None
        except NotStampableError as exc:
            self._give_up(str(exc))
            return None

    @property
    def changed(self) -> str | None:
        """What of the module changed since it was stamped."""
        return self._watch.change() if self._watch is not None else None

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
        """What runs a call by a stamped program; None where the module must be traced in full.

        Raises:
            NotServableError: with `strict`, when the module can't be stamped.
        """
        if self._template is None:
            return None
        call = read_plain(args, kwargs)
        if isinstance(call, str):
            return None
        found = next((made for made in self._programs.get(call.signature, ()) if made.serves(call)), None)
        if found is None:
            with self._lock:
                found = self._build(call)
        if found is None:
            return None
        return lambda: found.run(call, ForwardContext(self.registry))

    def poll(self, deadline: float | None = None) -> None:
        """Put to use what was compiled beside serving."""
        if self._pieces.slots:
            self._pieces.poll(self.report, deadline)

    def _build(self, call: PlainCall) -> Stamped | None:
        template = self._template
        if template is None or sum(map(len, self._programs.values())) >= _PROGRAMS:
            return None
        try:
            warm_up(self.compiler, call.tensors[0].device.type)
            with collector_paused():
                made = self._make(call, template)
        except AttributesReadError as exc:
            self._told |= exc.places
            self._template = self._choose()
            return self._build(call)
        except NotStampableError as exc:
            self._give_up(str(exc), template.layer_names(exc.layers))
            return None
        except (CompileError, OSError):
            self._template = None  # the full trace meets the same, and reports it
            return None
        except (CaptureError, LayerLookupError) as exc:
            self._give_up(f"the module can't be traced in one graph: {exc}")
            return None
        self._programs.setdefault(call.signature, []).append(made)
        self.report.strategy, self.report.template_layers = "stamped", template.length
        return made

    def _give_up(self, reason: str, layers: tuple[str, ...] = ()) -> None:
        self._template = None
        self._watch = Watch(self.model)  # once the module is another one, it is tried again
        reason = f"can't stamp the layers: {reason}"
        if self.options.strict:
            raise NotServableError(f"{reason} (strict=True: no step down)")
        self.report.fall_back(reason, layers, to="hoisted")

    def _make(self, call: PlainCall, template: Template) -> Stamped:
        """Trace the template, stamp it, compare."""
        report = self.report
        reads: set[str] = set()

        def consume(captured: Captured) -> tuple[Built, ShapeAssumptions]:
            templates.check_reads(self.model, template, reads)
            arguments = {e.node: e.source for e in captured.inputs if SOURCE.fullmatch(e.source)}
            sizes = [e.source for e in captured.inputs if e.kind == "symint" and e.node not in arguments]
            if sizes:
                raise NotStampableError(f"the trace depends on a size that no argument has: {named(sizes[0])}")
            bound = {e.node: e.value for e in captured.inputs if e.node not in arguments}
            built = build_program(
                captured,
                compiler=self.compiler,
                report=report,
                cache=self._pieces,
                arguments=arguments,
                bound=bound,
                stamping=templates.stamping(self.model, template, captured, arguments, self.registry),
                drop_unused=True,
                layer_of=templates.layer_of(template, captured),
                defer=self.options.ends == "auto" and not self.options.strict,
            )
            return built, read_assumptions(captured, set(call.shapes()))

        with report.phase("trace"):
            short = templates.short_model(self.model, template)
            before = dict(report.phases)
            built, assumptions = capture(traced_function(call), (short, examples(call)), consume, reads)
        inner = sum(report.phases[name] - before[name] for name in before if name != "trace")
        report.phases["trace"] -= inner
        self._reads |= reads
        with report.phase("verify"):
            made = Stamped(built.program, assumptions, self._compare(built, call))
        self._watch = Watch(self.model, self._reads)
        return made

    def _compare(self, built: Built, call: PlainCall) -> Returns:
        """Compare the program with the module's own forward, each on a twin; returns what it returns.

        Raises:
            NotStampableError: they differ.
        """
        assert built.bind_to is not None
        expected = make_twin(self.model)
        given = [tensor.clone() for tensor in call.tensors]
        args, kwargs = call.rebuild(given)
        with torch.no_grad(), forward_context(ForwardContext(expected.registry)):
            output = type(expected.model).forward(expected.model, *args, **kwargs)
        returns, leaves = Returns.read(output)
        if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise NotStampableError("the module returns something besides tensors")
        if self.options.verify == "off":
            return returns
        for exact in (True, False):
            twin = make_twin(self.model)
            program = built.bind_to(twin.model, twin.registry, twin.of, uncompiled=exact)
            copies = [tensor.clone() for tensor in call.tensors]
            again = PlainCall(tuple(copies), call.places, call.constants, call.form, call.signature)
            try:
                actual = run_flat(program, again, ForwardContext(twin.registry))
            except GlowplugError:
                raise
            except Exception as exc:
                raise NotStampableError(f"the program raised {said(exc)}") from exc
            reason = (
                differs(actual, leaves, exact=exact)
                or differs(copies, given, exact=exact)
                or states_differ(twin.model, expected.model, exact=exact)
            )
            if reason is not None:
                raise NotStampableError(f"the stamped program is not equal to eager: {reason}")
        return returns
