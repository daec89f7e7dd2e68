"""Builds the program of a transformers model: stamped from a template, or else from a full trace; then compares it."""

from __future__ import annotations

import functools
import itertools
import sys
from typing import Any

import torch
from transformers import PreTrainedModel

from glowplug.collector import collector_paused
from glowplug.compilers import PieceCompiler, warm_up
from glowplug.compilers.base import StoringCompiler
from glowplug.errors import (
    AttributesReadError,
    CaptureError,
    LayerLookupError,
    NotServableError,
    NotStampableError,
    NotStorableError,
)
from glowplug.graph.capture import weightless
from glowplug.hf import experts as hf_experts
from glowplug.hf import trace, verify
from glowplug.hf.attention_kinds import attention_kinds
from glowplug.hf.call import Call
from glowplug.hf.insides import Insides, InUse
from glowplug.hf.kinds import Slots, experts_kinds
from glowplug.hf.prover import Prover
from glowplug.hf.served import Served
from glowplug.hf.sharding import Processes, processes_of
from glowplug.hf.template import choose
from glowplug.hf.warm import Warm, describe, find, make_warm
from glowplug.layers.fitness import unfit
from glowplug.layers.registry import LayerRegistry, register_layers
from glowplug.options import Options
from glowplug.program import PieceCache, build_program
from glowplug.program.template import Template
from glowplug.reasons import why
from glowplug.report import Report, StoreReport
from glowplug.store import ArtifactStore


class Builder:
    """Builds the programs of one model, one for each signature of its calls.

    Args:
        model: the model.
        options: how to compile it.
        compiler: compiles pieces.
        report: receives everything that happens.
        store: where programs and pieces are kept.
        for_others: whether programs are made to be stored, and are not run here; so are those of a weightless model.
        bakes_bodies: whether op bodies are made for others, too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: Options,
        compiler: PieceCompiler,
        report: Report,
        store: ArtifactStore | None = None,
        *,
        for_others: bool = False,
        bakes_bodies: bool = True,
    ) -> None:
        self.model = model
        self.store = store
        self.options = options
        self.compiler = compiler
        self.report = report
        self.registry: LayerRegistry | None = None
        self._way: trace.Way = "cut"
        self.for_others = for_others or weightless(model)
        self._bakes_bodies = bakes_bodies
        self.insides: Insides | None = None
        self._slots: dict[str, Slots] = {}
        self.processes: Processes | None = None
        self._refused: str | None = None
        self._unfit = unfit(model) if not weightless(model) else None
        try:
            self.processes = processes_of(model)
        except CaptureError as exc:
            self._refused = str(exc)
        self._pieces = PieceCache()
        self._reads: set[str] = set()
        self._told: set[str] = set()
        self.prover = Prover(model, options, report, self._reads, self.processes)
        self._stored: Warm | None = None

    @property
    def layers(self) -> LayerRegistry:
        """The model's layers; they are registered when the first call is planned."""
        assert self.registry is not None
        return self.registry

    def find_stored(self, call: Call) -> Served | None:
        """A program from the store that serves calls like this one; None when there is none that is right."""
        if self._unfit is not None:
            return None
        plan = self._plan()
        warm = self._warm(call.inputs.device)
        if warm is None:
            return None
        key = warm.address(call.signature, plan, self.report)
        served = self._find(warm, key, call) if key is not None else None
        self.report.store = StoreReport.of(warm.store)
        if served is not None and self.insides is None:
            self._compile_insides()
        return served

    def build(self, call: Call) -> Served | str:
        """A program that serves calls like this one, compared with eager; or why there is none.

        With `for_others` it is made and stored, and not compared: it can't run in this process.

        Raises:
            CaptureError, CompileError: as the reason.
            NotServableError: with `strict`, when the model can't be stamped.
        """
        if self._refused is not None or self._unfit is not None:
            return self._refused or self._unfit or ""
        with collector_paused():
            served = self._build(call) if self.processes is None else self._build_together(call, self.processes)
            if isinstance(served, Served) and self.insides is None:
                self._compile_insides()
            if isinstance(served, Served):
                served.recipe = None  # it holds the whole trace
        if self.store is not None:
            self.report.store = StoreReport.of(self.store)
        return served

    @property
    def facts(self) -> dict[str, Any]:
        """What the address of the latest program was made of, by name."""
        return self._stored.manifests.facts if self._stored is not None else {}

    @property
    def distributed(self) -> bool:
        """Whether several processes run the model together."""
        return self.processes is not None or self._refused is not None

    @property
    def pending(self) -> bool:
        """Whether something is being compiled beside serving."""
        return bool(self._pieces.slots) or (self.insides is not None and self.insides.pending)

    @property
    def in_use(self) -> InUse:
        """The insides that a sequence is to run that begins now."""
        return self.insides.in_use if self.insides is not None else InUse()

    def poll(self, deadline: float | None = None) -> None:
        """Put to use what was compiled beside serving; wait for it until `deadline` (`time.monotonic()`), if given."""
        self._pieces.poll(self.report, deadline)
        if self.insides is not None:
            self.insides.poll(deadline)

    def finish(self) -> None:
        """Wait for the pieces that are compiled beside, for others to use."""
        self._pieces.finish()

    def _build(self, call: Call) -> Served | str:
        plan = self._plan()
        warm = self._warm(call.inputs.device)
        if warm is None:
            return self._trace(call, plan)
        key = warm.address(call.signature, plan, self.report)
        if key is None:
            return self._trace(call, plan)
        served = self._find(warm, key, call)
        if served is not None:
            return served
        with warm.store.lock("manifest", key):
            # Whoever held the lock before may have made it.
            found = self._find(warm, key, call) or self._trace(call, plan)
            if isinstance(found, Served) and found.recipe is not None:
                with self.report.phase("store"):
                    self._keep(warm, key, found)
        return found

    def _build_together(self, call: Call, processes: Processes) -> Served | str:
        """The same of a model that several processes run together. Each makes or finds its program without running
        it, as one may wait for a lock that another holds; then all compare theirs, in step."""
        error: Exception | None = None
        try:
            found = self._build(call)
        except Exception as exc:
            error, found = exc, why(exc)
        problem = processes.agree(found if isinstance(found, str) else None)
        if error is not None:
            raise error
        if problem is not None or isinstance(found, str):
            return problem or found
        if self.options.verify == "once":
            exact, proved = zip(*processes.gather((self._has_exact(found), found.proved)), strict=True)
            classes = verify.GLANCE if all(proved) else verify.CLASSES
            differs = self.prover.prove(found, call, self.layers, classes, exact=all(exact))
            warm = self._warm(call.inputs.device)
            if warm is not None and found.key is not None:
                warm.judge(found.key, differs.reason if differs is not None else None)
            if differs is not None:
                return f"the program is not equal to eager: {differs.reason}"
        return found

    def _warm(self, device: torch.device) -> Warm | None:
        """The store, opened for this model's device."""
        if self._stored is None:
            self._stored = make_warm(self.model, self.options, self.compiler, self.store, device, self.processes)
            self._pieces.store = self._stored.pieces if self._stored is not None else None
        return self._stored

    def _find(self, warm: Warm, key: str, call: Call) -> Served | None:
        """A stored program that serves calls like this one; None when there is none that is right."""
        report = self.report
        with report.phase("load"):
            found = find(
                warm,
                key,
                self.model,
                self.layers,
                self.prover.positions,
                wait=not self._defers,
            )
        if found is None:
            return None
        manifest, served = found.manifest, found.served
        self._reads |= set(manifest.reads)
        served.key, served.proved = key, manifest.verified
        problem = self._verify(served, call, verify.GLANCE if manifest.verified else verify.CLASSES)
        if problem is not None or (self.processes is None and self.options.verify == "once" and not manifest.verified):
            warm.judge(key, problem.reason if problem is not None else None)
        if problem is not None:
            return None
        self._pieces.compiled |= found.runners
        self._slots |= found.slots
        self._pieces.order += [piece for piece in manifest.plan.pieces() if piece not in self._pieces.order]
        self._pieces.slots += found.pending
        report.pending_pieces = len(self._pieces.pending)
        report.found(served.program, manifest.facts, len(set(self._pieces.order)))
        return served

    def _keep(self, warm: Warm, key: str, served: Served) -> None:
        assert served.recipe is not None
        try:
            manifest = describe(
                served.recipe,
                served,
                self.model,
                sorted(self._reads),
                self._slots,
                self._pieces.addresses,
                self.report,
                verified=self.options.verify == "once" and not self.for_others and self.processes is None,
            )
        except NotStorableError as exc:
            warm.store.note(f"the program is not stored: {exc}")
            return
        self._pieces.wait_until_locked()  # whoever finds the program sees which pieces are being compiled
        warm.keep(key, manifest)
        served.key = key

    @property
    def _defers(self) -> bool:
        """Whether pieces that run seldom in a step may start uncompiled."""
        return self.options.ends == "auto" and not self.options.strict and self.processes is None

    @property
    def _compiles_insides(self) -> bool:
        """Whether opaque experts end up compiled: before the first answer, or beside serving where forks can do it."""
        beside = self.options.inside == "auto" and sys.platform == "linux"
        return isinstance(self.compiler, StoringCompiler) and (beside or self.options.inside == "compiled")

    def _plan(self) -> hf_experts.ExpertsPlan:
        """What happens to the experts; registers the layers."""
        plan = hf_experts.plan(self.model, self.options.experts, insides=self._compiles_insides)
        if self.registry is None:
            self.registry = register_layers(self.model, identity=self.options.resolved_identity, layers=plan.layers)
            for op, names in plan.orders.items():
                self.registry.set_order(op, names)
        self.report.experts = plan.kind
        return plan

    def _trace(self, call: Call, plan: hf_experts.ExpertsPlan) -> Served | str:
        """A program from a trace, or why there is none."""
        warm_up(self.compiler, call.inputs.device.type)
        self.report.start = "cold"
        refused: CaptureError | LayerLookupError | None = None
        for attempt, way in itertools.product((self._stamped, self._full), trace.WAYS):
            if way != "cut" and (refused is None or self.options.resolved_identity == "ordered"):
                continue
            self._way = way
            try:
                served = attempt(call, plan)
            except (CaptureError, LayerLookupError) as exc:
                refused = refused or exc
                continue
            if served is not None:
                self.report.attention = "cut" if way == "cut" else "whole"
                return served
        assert refused is not None
        raise refused

    def _full(self, call: Call, plan: hf_experts.ExpertsPlan) -> Served | str:
        """A program of the full trace, or why there is none."""
        self.report.strategy, self.report.template_layers = self.options.resolved_identity, 0
        served = self._capture(call, plan, None)
        problem = self._verify(served, call)
        return served if problem is None else problem.reason

    def _compile_insides(self) -> None:
        """Compile the inside of opaque experts, and of attention that is several kernels, now or beside."""
        choice = self.options.inside
        if choice == "eager" or self.compiler.name == "eager":
            return
        if self.processes is not None:  # trials would run collectives, each process its own number of them
            return
        layers = {op: {name: self.layers[name] for name in self.layers.order(op)} for op in self._slots}
        kinds = experts_kinds(layers, self._slots) + attention_kinds(self.model, self.prover.forms)
        if not kinds:
            return
        self.insides = Insides(self.model, kinds, self.compiler, self.report, self._pieces.store)
        if self.for_others:
            if self._bakes_bodies or choice == "compiled":
                with self.report.phase("inside"):
                    self.insides.compile_unjudged()
            return
        if choice == "auto":
            self.insides.compile_beside()
            return
        with self.report.phase("inside"):
            self.insides.compile_here()

    def _stamped(self, call: Call, plan: hf_experts.ExpertsPlan) -> Served | None:
        """A program stamped from a template; None when the model must be traced in full."""
        if self.options.stamp == "off" or self.options.resolved_identity != "hoisted":
            return None
        template: Template | None = None
        try:
            template = choose(self.model, self._told)
            if template is None:
                return None
            served = self._capture(call, plan, template)
        except AttributesReadError as exc:
            self._told |= exc.places
            return self._stamped(call, plan)
        except NotStampableError as exc:
            self._step_down(str(exc), template.layer_names(exc.layers) if template is not None else ())
            return None
        problem = self._verify(served, call)
        if problem is not None:
            layer = self.prover.first_layer(served, template.stack, problem, self.layers)
            where = f"; layer {layer} is the first that differs" if layer is not None else ""
            self._step_down(
                f"the stamped program is not equal to eager: {problem.reason}{where}",
                template.layer_names((layer,) if layer is not None else ()),
            )
            return None
        self.report.strategy, self.report.template_layers = "stamped", template.length
        return served

    def _step_down(self, reason: str, layers: tuple[str, ...]) -> None:
        reason = f"can't stamp the layers: {reason}"
        if self.options.strict:
            raise NotServableError(f"{reason} (strict=True: no step down)")
        self.report.fall_back(reason, layers, to="hoisted")

    def _capture(self, call: Call, plan: hf_experts.ExpertsPlan, template: Template | None) -> Served:
        build = functools.partial(
            build_program,
            compiler=self.compiler,
            report=self.report,
            cache=self._pieces,
            both=self.options.verify == "once",
            defer=self._defers,
        )
        traced = trace.trace_program(
            self.model, call, plan, template, self._way, self.layers, self.prover.positions, self.report, build
        )
        self._reads |= traced.reads
        self._slots |= traced.slots
        return traced.served

    def _verify(self, served: Served, call: Call, classes: verify.Classes = verify.CLASSES) -> verify.Problem | None:
        """Compare a program with eager, and start watching the model: from here on, changes make the program stale."""
        if self.for_others:  # it can't run here; whoever serves the program compares
            return None
        if self.processes is not None:  # all compare at once, when each has a program
            self.prover.start_watching()
            return None
        return self.prover.prove(served, call, self.layers, classes, exact=self._has_exact(served))

    def _has_exact(self, served: Served) -> bool:
        """Whether there is a form of the program with uncompiled pieces."""
        return served.uncompiled is not None or self.compiler.name == "eager"
