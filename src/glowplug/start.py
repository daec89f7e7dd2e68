"""One start: from a call to the program that serves calls like it.

    find in the store -> trace -> split -> fingerprint -> stamp -> compile -> bind -> check -> keep

`start` reads from top to bottom. The ladder (a stamped template, the whole model, each in every way in which the front
end can show it to the trace) is one loop, in `_make`; each step down is recorded with its reason.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import replace

from glowplug.compilation import Compilation
from glowplug.compilers import cool_down, quick_tuning, warm_up
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
from glowplug.layers.stack import choose_preview
from glowplug.layers.watch import Watch, distinct_reads
from glowplug.program import Candidate, Program, Traced, begin_pieces, build_program
from glowplug.program import template as templates
from glowplug.program.template import Template
from glowplug.ready import Ready
from glowplug.reasons import why
from glowplug.runtime.collector import collector_paused
from glowplug.store.address import address as address_of
from glowplug.store.address import class_modules, globals_of, modules_of, sources_of
from glowplug.store.record import Record
from glowplug.store.records import places_of
from glowplug.verify.check import Agree


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
        try:
            candidate = _start(c, call) if c.processes is None else _start_together(c, call)
            return candidate if isinstance(candidate, str) else _ready(c, candidate)
        finally:
            c.report_store()


def find_stored(c: Compilation, call: Call) -> Ready | None:
    """A program from the store that serves calls like this one; None when there is none that is right."""
    address = _address(c, call) if c.unfit is None else None
    candidate = _find(c, address, call) if address is not None else None
    ready = _ready(c, candidate) if candidate is not None else None
    c.report_store()
    return ready


def _ready(c: Compilation, candidate: Candidate) -> Ready:
    c.compile_bodies()
    return Ready(c.front, candidate.program, candidate.assumptions, candidate.returns)


def _start(c: Compilation, call: Call) -> Candidate | str:
    address = _address(c, call)
    if address is None or c.records is None:
        return _make(c, call, None)
    candidate = _find(c, address, call)
    if candidate is not None:
        return candidate
    with c.records.lock(address):
        # Whoever held the lock before may have made it.
        return _find(c, address, call) or _make(c, call, address)


def _start_together(c: Compilation, call: Call) -> Candidate | str:
    """The same of a model that several processes run together. Each makes or finds its program without running it, as
    one may wait for a lock that another holds; then all compare theirs, in step."""
    error: Exception | None = None
    try:
        candidate = _start(c, call)
    except Exception as exc:
        error, candidate = exc, why(exc)
    problem = c.processes.agree(candidate if isinstance(candidate, str) else None)
    if error is not None:
        raise error
    if problem is not None or isinstance(candidate, str):
        return problem or str(candidate)
    if c.options.verify == "off":
        return candidate
    graphs = candidate.graphs()
    has_graphs, proved = zip(*c.processes.gather((graphs is not None, candidate.proved)), strict=True)
    everywhere = replace(candidate, graphs=lambda: graphs if all(has_graphs) else None, proved=all(proved))
    compared = _compare(c, everywhere, call, c.processes.agree)
    reason = compared if isinstance(compared, str) else None
    if c.records is not None and candidate.address is not None:
        c.records.judge(candidate.address, reason)
    return compared if reason is None else f"the program is not equal to eager: {reason}"


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


def _find(c: Compilation, address: str, call: Call) -> Candidate | None:
    """The stored program of an address; None when there is none that is right."""
    assert c.records is not None
    with c.report.phase("load"):
        stored = c.records.find(address, c.registry, wait=not c.defers)
        if stored is None:
            return None
        record = stored.record
        try:
            returns, forms = c.front.from_record(record.facts)
        except Exception as exc:  # whatever comes of a stored program, it is built again
            c.records.drop(address, why(exc))
            return None
    c.reads |= set(record.reads)
    candidate = Candidate(
        stored.program, record.assumptions, returns, stored.graphs, None, address, proved=record.verified
    )
    checked = check(c, candidate, call)
    if c.proves and (isinstance(checked, str) or not record.verified):
        c.records.judge(address, checked if isinstance(checked, str) else None)
    if isinstance(checked, str):
        return None
    c.forms |= forms
    c.pieces.add(stored.pieces)
    c.report.pending_pieces = len(c.pieces.pending)
    c.report.add_stored_program(stored.program, record.facts, len(set(c.pieces.order)))
    return checked


# -- make --------------------------------------------------------------------------------------------------------


def _make(c: Compilation, call: Call, address: str | None) -> Candidate | str:
    """A program from a trace, kept at its address, if it has one; or why there is none."""
    warm_up(c.compiler, call.device.type)
    try:
        return _climb(c, call, address)
    finally:
        cool_down(c.compiler)
        c.pieces.take_ahead()  # nobody does if no program was made


def _climb(c: Compilation, call: Call, address: str | None) -> Candidate | str:
    """The ladder, rung by rung."""
    c.report.start = "cold"
    refused: CaptureError | LayerLookupError | None = None
    for rung in c.front.rungs():
        if rung.again and refused is None:
            continue
        try:
            candidate = _make_stamped(c, call, rung) if rung.stamped else _make_in_full(c, call, rung)
        except (CaptureError, LayerLookupError) as exc:
            refused = refused or exc
            continue
        if candidate is not None:
            c.front.climbed(rung, c.report)
            return candidate if isinstance(candidate, str) or address is None else _keep(c, address, candidate)
    if c.front.guarded is None:
        assert refused is not None
        raise refused
    if refused is not None:
        c.step_down(f"the module can't be traced in one graph: {refused}")
    return ""


def _make_in_full(c: Compilation, call: Call, rung: Rung) -> Candidate | str:
    c.report.strategy, c.report.template_layers = c.options.resolved_identity, 0
    return check(c, _trace(c, call, rung, None), call)


def _make_stamped(c: Compilation, call: Call, rung: Rung) -> Candidate | None:
    """A program stamped from a template; None when the model must be traced in full."""
    template: Template | None = None
    try:
        template = c.front.choose(c.read_attributes)
        if template is None:
            return None
        _compile_ahead(c, call, rung, template)
        checked = check(c, _trace(c, call, rung, template), call)
    except AttributesReadError as exc:
        c.read_attributes |= exc.places
        return _make_stamped(c, call, rung)
    except NotStampableError as exc:
        c.step_down(str(exc), template.layer_names(exc.layers) if template is not None else ())
        return None
    if isinstance(checked, str):
        c.step_down(f"the stamped program is not equal to eager: {checked}")
        return None
    c.report.strategy, c.report.template_layers = "stamped", template.length
    return checked


def _compile_ahead(c: Compilation, call: Call, rung: Rung, template: Template) -> None:
    """Let a helper compile the pieces of a trace of even fewer layers than the template's while that is traced.
    A piece of the program that this did not give is compiled later."""
    layers = choose_preview(template.kinds) if getattr(c.compiler, "can_hand_over", False) else None
    if layers is None:
        return
    with contextlib.suppress(Exception), c.report.phase("trace"):  # what fails here fails again, and is reported there
        target = c.front.target(call, templates.short_model(c.front.model, template, layers), rung)

        def consume(captured: Captured) -> None:
            arguments, _ = target.sort(captured)
            begin_pieces(captured, compiler=c.compiler, cache=c.pieces, arguments=arguments)

        if not target.cut_at_layers:
            capture(target.function, target.examples, consume)


def _trace(c: Compilation, call: Call, rung: Rung, template: Template | None) -> Candidate:
    """Trace the model, or its template, and bind the program of that to the model.

    Raises:
        CaptureError, CompileError: it can't be traced, or compiled.
        AttributesReadError, NotStampableError: the template does not show how to run all layers.
    """
    model = c.front.model
    target = c.front.target(call, templates.short_model(model, template) if template is not None else model, rung)
    reads: set[str] = set()
    watch: Watch | None = None

    def consume(captured: Captured) -> tuple[Traced, ShapeAssumptions]:
        if template is not None:
            templates.check_reads(model, template, reads)
        c.reads |= reads
        arguments, bound = target.sort(captured)
        c.forms |= c.front.read_forms(captured, c.registry, call)
        stamping = layer_of = None
        if template is not None:
            stamping = templates.stamping(model, template, captured, arguments, c.registry)
            layer_of = templates.layer_of(template, captured) if target.cut_at_layers else None
        rehearsal = c.front.rehearsal(call, c.registry, check_order=c.check_order) if c.compares else None
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
            meanwhile=functools.partial(rehearse, rehearsal) if rehearsal is not None else None,
        )
        unread = frozenset(entry.node for entry in captured.inputs if target.is_unread(entry.source))
        return Traced(built, traced_files(), unread, watch), read_assumptions(captured, set(target.varying))

    def rehearse(rehearsal: Callable[[Program], None], uncompiled: Program) -> None:
        nonlocal watch
        watch = c.begin_watch()
        rehearsal(uncompiled)

    with c.report.phase("trace", apart=("split", "fingerprint", "stamp", "compile", "bind")):
        traced, assumptions = capture(target.function, target.examples, consume, reads)
    built = traced.built
    graphs = functools.partial(built.program.with_slots, built.graphs)
    return Candidate(built.program, assumptions, c.front.returns(), graphs, traced)


# -- check and keep ----------------------------------------------------------------------------------------------


def check(c: Compilation, candidate: Candidate, call: Call) -> Candidate | str:
    """Compare a program with the model's own forward; returns it, or why it must not serve. From here on changes of the
    model are noticed: they make programs stale."""
    if c.compares:
        return _compare(c, candidate, call, None)
    if not c.for_others:
        c.watch()
    return candidate


def _compare(c: Compilation, candidate: Candidate, call: Call, agree: Agree | None) -> Candidate | str:
    for attempt in range(2):
        begun = candidate.traced.watch if candidate.traced is not None and attempt == 0 else None
        watch = c.watch(begun)
        with c.report.phase("verify") if c.options.verify == "once" else contextlib.nullcontext(), quick_tuning():
            reason, returns = c.front.compare(candidate, call, c.registry, agree, check_order=c.check_order)
        if reason is not None:
            return reason
        changed = watch.change()
        changed = agree(changed) if agree is not None else changed
        if changed is None:
            break
        if attempt == 1:  # the first run may set up what later ones find
            return f"the model's own forward changes the model each time that it runs: {changed}"
    return replace(candidate, returns=returns)


def _keep(c: Compilation, address: str, candidate: Candidate) -> Candidate:
    """Store a program that was traced here."""
    traced = candidate.traced
    assert c.records is not None and traced is not None
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
            assumptions=candidate.assumptions,
            reads=tuple(distinct_reads(model, sorted(c.reads))),
            globals=globals_of(c.reads),
            sources=sources_of(modules_of(traced.files) - class_modules(model)),
            addresses={piece.digest: known_by for piece, known_by in c.pieces.addresses.items()},
            facts={**facts, **c.front.to_record(candidate.returns, c.forms)},
            verified=c.proves,
        )
        c.pieces.wait_until_locked()  # whoever finds the program sees which pieces are being compiled
        c.records.keep(address, record)
    except NotStorableError as exc:
        c.records.store.note(f"the program is not stored: {exc}")
        return candidate
    return replace(candidate, address=address)
