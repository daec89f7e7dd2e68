"""One start: from a call to the program that serves calls like it.

    find in the store -> trace -> split -> fingerprint -> stamp -> compile -> bind -> check -> keep

`start` reads from top to bottom. The ladder (a stamped template, the whole model, each in every way in which the front
end can show it to the trace) is one loop, in `_make`; each step down is recorded with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from glowplug.compilation import Compilation
from glowplug.compilers import warm_up
from glowplug.errors import (
    AttributesReadError,
    CaptureError,
    LayerLookupError,
    NotStampableError,
    NotStorableError,
)
from glowplug.front import Call, Rung
from glowplug.graph.capture import Captured, capture, traced_files
from glowplug.graph.shapes import ShapeAssumptions, read_assumptions
from glowplug.program import Built, Program, build_program
from glowplug.program import template as templates
from glowplug.program.template import Template
from glowplug.ready import Ready
from glowplug.reasons import why
from glowplug.report import StoreReport
from glowplug.runtime.collector import collector_paused
from glowplug.store.address import address as address_of
from glowplug.store.address import class_modules, globals_of, modules_of, sources_of
from glowplug.store.record import Record
from glowplug.store.records import places_of
from glowplug.verify.check import Agree


@dataclass(frozen=True)
class Traced:
    """What came of a trace.

    Attributes:
        built: its program, and what that was made of.
        assumptions: what the trace assumed of sizes.
        files: of all code that was traced.
        unread: graph values that stood for sizes in the trace, and that no run reads.
    """

    built: Built
    assumptions: ShapeAssumptions
    files: frozenset[str]
    unread: frozenset[str]


def start(c: Compilation, call: Call) -> Ready | str:
    """A program that serves calls like this one, compared with the model's own forward; or why there is none.

    Args:
        c: the model's compilation.
        call: the call.

    Raises:
        CaptureError, CompileError: as the reason.
        NotServableError: with `strict`, when the model can't be stamped.
    """
    if c.unfit is not None:
        return c.unfit
    with collector_paused():
        ready = _start(c, call) if c.processes is None else _start_together(c, call)
        if isinstance(ready, Ready):
            c.compile_bodies()
    if c.records is not None:
        c.report.store = StoreReport.of(c.records.store)
    return ready


def find_stored(c: Compilation, call: Call) -> Ready | None:
    """A program from the store that serves calls like this one; None when there is none that is right."""
    address = _address(c, call) if c.unfit is None else None
    ready = _find(c, address, call) if address is not None else None
    if c.records is not None:
        c.report.store = StoreReport.of(c.records.store)
    if ready is not None:
        c.compile_bodies()
    return ready


def _start(c: Compilation, call: Call) -> Ready | str:
    address = _address(c, call)
    if address is None or c.records is None:
        return _make(c, call)[0]
    ready: Ready | str | None = _find(c, address, call)
    if ready is not None:
        return ready
    with c.records.lock(address):
        ready = _find(c, address, call)  # whoever held the lock before may have made it
        if ready is None:
            ready, traced = _make(c, call)
            if isinstance(ready, Ready) and traced is not None:
                with c.report.phase("store"):
                    _keep(c, address, ready, traced)
    return ready


def _start_together(c: Compilation, call: Call) -> Ready | str:
    """The same of a model that several processes run together. Each makes or finds its program without running it, as
    one may wait for a lock that another holds; then all compare theirs, in step."""
    error: Exception | None = None
    try:
        found = _start(c, call)
    except Exception as exc:
        error, found = exc, why(exc)
    problem = c.processes.agree(found if isinstance(found, str) else None)
    if error is not None:
        raise error
    if problem is not None or isinstance(found, str):
        return problem or str(found)
    if c.options.verify == "once":
        graphs = found.graphs() if found.graphs is not None else None
        has_graphs, proved = zip(*c.processes.gather((graphs is not None, found.proved)), strict=True)
        graphs = graphs if all(has_graphs) else None
        reason = _check(c, found, graphs, call, c.processes.agree, glance=all(proved))
        found.graphs = None
        if c.records is not None and found.address is not None:
            c.records.judge(found.address, reason)
        if reason is not None:
            return f"the program is not equal to eager: {reason}"
    return found


# -- find --------------------------------------------------------------------------------------------------------


def _address(c: Compilation, call: Call) -> str | None:
    """The address of the program for calls like this one; None when nothing can be stored."""
    if c.records is None:
        return None
    try:
        with c.report.phase("load"):
            options = [c.options.resolved_identity, c.options.stamp]
            c.facts = {"environment": c.records.pieces.environment, "options": options, **c.front.facts(call)}
            return address_of(c.facts)
    except NotStorableError as exc:
        c.records.store.note(f"the model is not stored: {exc}")
        return None


def _find(c: Compilation, address: str, call: Call) -> Ready | None:
    """The stored program of an address; None when there is none that is right."""
    assert c.records is not None
    with c.report.phase("load"):
        stored = c.records.find(address, c.registry, wait=not c.defers)
        if stored is None:
            return None
        record = stored.record
        try:
            returns, forms = c.front.from_record(record.facts)
        except Exception as exc:  # whatever comes of a stored program, it is made anew
            c.records.drop(address, why(exc))
            return None
    c.reads |= set(record.reads)
    ready = Ready(c.front, stored.program, record.assumptions, returns)
    ready.address, ready.proved = address, record.verified
    if c.processes is not None:  # all compare at once, when each has a program
        ready.graphs = stored.graphs
        c.watch()
    elif not c.for_others:
        graphs = stored.graphs() if c.options.verify == "once" else None
        reason = check(c, ready, graphs, call, glance=record.verified)
        if reason is not None or (c.options.verify == "once" and not record.verified):
            c.records.judge(address, reason)
        if reason is not None:
            return None
    c.forms |= forms
    c.pieces.add(stored.pieces)
    c.report.pending_pieces = len(c.pieces.pending)
    c.report.add_stored_program(stored.program, record.facts, len(set(c.pieces.order)))
    return ready


# -- make --------------------------------------------------------------------------------------------------------


def _make(c: Compilation, call: Call) -> tuple[Ready | str, Traced | None]:
    """A program from a trace, or why there is none: the ladder, rung by rung."""
    warm_up(c.compiler, call.device.type)
    c.report.start = "cold"
    refused: CaptureError | LayerLookupError | None = None
    for rung in c.front.rungs():
        if rung.again and refused is None:
            continue
        try:
            made = _make_stamped(c, call, rung) if rung.stamped else _make_in_full(c, call, rung)
        except (CaptureError, LayerLookupError) as exc:
            refused = refused or exc
            continue
        if made is not None:
            c.front.climbed(rung, c.report)
            return made
    if c.front.guarded is None:
        assert refused is not None
        raise refused
    if refused is not None:
        c.step_down(f"the module can't be traced in one graph: {refused}")
    return "", None


def _make_in_full(c: Compilation, call: Call, rung: Rung) -> tuple[Ready | str, Traced | None]:
    c.report.strategy, c.report.template_layers = c.options.resolved_identity, 0
    ready, traced = _trace(c, call, rung, None)
    reason = check(c, ready, _graphs_of(traced), call)
    return (ready, traced) if reason is None else (reason, None)


def _make_stamped(c: Compilation, call: Call, rung: Rung) -> tuple[Ready | str, Traced | None] | None:
    """A program stamped from a template; None when the model must be traced in full."""
    template: Template | None = None
    try:
        template = c.front.choose(c.read_attributes)
        if template is None:
            return None
        ready, traced = _trace(c, call, rung, template)
        reason = check(c, ready, _graphs_of(traced), call)
    except AttributesReadError as exc:
        c.read_attributes |= exc.places
        return _make_stamped(c, call, rung)
    except NotStampableError as exc:
        c.step_down(str(exc), template.layer_names(exc.layers) if template is not None else ())
        return None
    ready.bind_to = None  # it holds the whole trace
    if reason is not None:
        c.step_down(f"the stamped program is not equal to eager: {reason}")
        return None
    c.report.strategy, c.report.template_layers = "stamped", template.length
    return ready, traced


def _trace(c: Compilation, call: Call, rung: Rung, template: Template | None) -> tuple[Ready, Traced]:
    """Trace the model, or its template, and bind the program of that to the model.

    Raises:
        CaptureError, CompileError: it can't be traced, or compiled.
        AttributesReadError, NotStampableError: the template does not show how to run all layers.
    """
    model = c.front.model
    target = c.front.target(call, templates.short_model(model, template) if template is not None else model, rung)
    reads: set[str] = set()

    def consume(captured: Captured) -> Traced:
        if template is not None:
            templates.check_reads(model, template, reads)
        arguments, bound = target.sort(captured)
        c.forms |= c.front.read_forms(captured, c.registry, call)
        stamping = layer_of = None
        if template is not None:
            stamping = templates.stamping(model, template, captured, arguments, c.registry)
            layer_of = templates.layer_of(template, captured) if target.cut_at_layers else None
        built = build_program(
            captured,
            compiler=c.compiler,
            report=c.report,
            cache=c.pieces,
            arguments=arguments,
            bound=bound,
            check=target.check,
            stamping=stamping,
            drop_unused=True,
            defer=c.defers,
            layer_of=layer_of,
        )
        unread = frozenset(entry.node for entry in captured.inputs if target.is_unread(entry.source))
        return Traced(built, read_assumptions(captured, set(target.varying)), traced_files(), unread)

    with c.report.phase("trace", apart=("split", "fingerprint", "stamp", "compile", "bind")):
        traced = capture(target.function, target.examples, consume, reads)
    c.reads |= reads
    built = traced.built
    ready = Ready(c.front, built.program, traced.assumptions, c.front.returns())
    ready.bind_to = built.for_copy if template is not None else None
    if c.processes is not None:
        ready.graphs = lambda: _graphs_of(traced)
    return ready, traced


# -- check and keep ----------------------------------------------------------------------------------------------


def _graphs_of(traced: Traced) -> Program:
    """The program of a trace with uncompiled pieces."""
    return traced.built.program.with_slots(traced.built.graphs)


def check(c: Compilation, ready: Ready, graphs: Program | None, call: Call, *, glance: bool = False) -> str | None:
    """Compare a program with the model's own forward, and begin to watch the model: changes make the program stale.

    Args:
        c: the model's compilation.
        ready: the program.
        graphs: the same with uncompiled pieces, if there are any.
        call: a call that it is to serve.
        glance: an earlier process has compared it in every case.

    Returns:
        Why it must not serve, or None.
    """
    if c.for_others:  # it can't run here; whoever serves the program compares
        return None
    if c.processes is not None:  # all compare at once, when each has a program
        c.watch()
        return None
    return _check(c, ready, graphs, call, None, glance=glance)


def _check(
    c: Compilation, ready: Ready, graphs: Program | None, call: Call, agree: Agree | None, *, glance: bool
) -> str | None:
    for attempt in range(2):
        watch = c.watch()
        with c.report.phase("verify"):
            reason = c.front.compare(ready, graphs, call, c.registry, agree, glance=glance, check_order=c.check_order)
        if reason is not None:
            return reason
        changed = watch.change()
        changed = agree(changed) if agree is not None else changed
        if changed is None:
            break
        if attempt == 1:  # the first run may set up what later ones find
            return f"the model's own forward changes the model each time that it runs: {changed}"
    return None


def _keep(c: Compilation, address: str, ready: Ready, traced: Traced) -> None:
    """Store a program that was made here."""
    assert c.records is not None
    model, built, binder = c.front.model, traced.built, traced.built.binder
    wanted = built.plan.values()
    outside = {name: value for name, value in built.bound.items() if name in wanted}
    facts = {name: getattr(c.report, name) for name in ("strategy", "experts", "attention", "template_layers")}
    try:
        record = Record(
            plan=built.plan,
            places=places_of(model, outside, traced.unread),
            stack=binder.stack if binder is not None else None,
            handles=binder.handles if binder is not None else frozenset(),
            assumptions=ready.assumptions,
            reads=tuple(sorted(c.reads)),
            globals=globals_of(c.reads),
            sources=sources_of(modules_of(traced.files) - class_modules(model)),
            addresses={piece.digest: known_by for piece, known_by in c.pieces.addresses.items()},
            facts={**facts, **c.front.to_record(ready, c.forms)},
            verified=c.options.verify == "once" and not c.for_others and c.processes is None,
        )
        c.pieces.wait_until_locked()  # whoever finds the program sees which pieces are being compiled
        c.records.keep(address, record)
    except NotStorableError as exc:
        c.records.store.note(f"the program is not stored: {exc}")
        return
    ready.address = address
