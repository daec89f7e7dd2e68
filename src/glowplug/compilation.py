"""Everything that was compiled of a model as it is: its programs, what calls they serve, and what they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from glowplug.bodies import Bodies, Forms, InUse
from glowplug.compilers import PieceCompiler
from glowplug.compilers.base import StoringCompiler
from glowplug.compilers.environment import differences
from glowplug.cuda_graphs import CudaGraphs, Reads, recorder_for
from glowplug.errors import (
    CaptureError,
    NotServableError,
)
from glowplug.front import Call, FrontEnd
from glowplug.graph.capture import weightless
from glowplug.layers.watch import Watch
from glowplug.options import Options
from glowplug.program import PieceCache
from glowplug.ready import Ready, Refusal
from glowplug.report import Report, StoreReport
from glowplug.runtime.fitness import unfit
from glowplug.store import ArtifactStore
from glowplug.store.records import Records

_ATTEMPTS = 4
"""How often a program for calls of one signature is tried to be made, if the model has changed each time."""


class Compilation:
    """Everything that was compiled of a model as it is: its programs, and what they share.

    Args:
        front: the model's front end.
        options: how to compile it.
        compiler: compiles pieces.
        report: receives everything that happens.
        store: where programs and pieces are kept.
        check_order: with `identity="ordered"`, whether a wrong order raises.
        for_others: programs are made to be stored, and are not run here. Of a model without weights, always.
        bakes_bodies: with `for_others`, op bodies are made, too.

    Attributes:
        registry: the model's layers.
        pieces: its compiled pieces.
        facts: what the address of the latest program was made of, by name.
        op_bodies: those of its opaque ops, once a program was made.
        graphs: the CUDA graphs of its decode steps; None where there are to be none.
        unfit: why the model can't be compiled at all, or None.
    """

    def __init__(
        self,
        front: FrontEnd,
        options: Options,
        compiler: PieceCompiler,
        report: Report,
        store: ArtifactStore | None = None,
        *,
        check_order: bool = True,
        for_others: bool = False,
        bakes_bodies: bool = True,
    ) -> None:
        has_weights = not weightless(front.model)
        self.front = front
        self.options = options
        self.compiler = compiler
        self.report = report
        self.check_order = check_order
        self.for_others = for_others or not has_weights
        self.unfit = unfit(front.model) if has_weights else None
        self.processes: Any = None
        self.distributed = False
        try:
            self.processes = front.processes
            self.distributed = self.processes is not None
        except CaptureError as exc:  # distributed in a way that can't be followed
            self.unfit, self.distributed = str(exc), True
        self.registry = front.register()
        report.experts = front.experts
        self.records = self._open_records(store)
        self.pieces = PieceCache(store=self.records.pieces if self.records is not None else None)
        self.reads: set[str] = set()
        self.read_attributes: set[str] = set()
        self.forms: Forms = {}
        self.facts: dict[str, Any] = {}
        self._bakes_bodies = bakes_bodies
        self.op_bodies: Bodies | None = None
        self._watch: Watch | None = None
        self._programs: dict[Any, list[Ready]] = {}
        self._refusals: dict[Any, Refusal] = {}
        self._attempts: Counter[Any] = Counter()
        self._stepped_down = False
        self.graphs = self._open_graphs()

    # -- what is known of calls -------------------------------------------------------------------------------

    def known(self, call: Call) -> Ready | Refusal | None:
        """What serves a call, or why nothing does; None when that is to be found out. A refusal holds while the model
        is what it was: a hook that can't be traced may only be there for a while."""
        key = self._key(call)
        refusal = self._refusals.get(key)
        if refusal is not None:
            again = refusal.watch is not None and self._attempts[key] < _ATTEMPTS
            return None if again and refusal.watch is not None and refusal.watch.change() else refusal
        broken: str | None = None
        for ready in self._programs.get(call.signature, ()):
            broken = ready.broken_by(call)
            if broken is None:
                return ready
        most = self.front.most_programs
        full = broken is not None if most is None else sum(map(len, self._programs.values())) >= most
        return Refusal(broken or "", eager=self.front.guarded is None) if full else None

    def keep(self, call: Call, outcome: Ready | str, *, for_good: bool = False) -> Ready | Refusal:
        """Remember what serves a call, or why nothing does; `for_good`: even once the model has changed."""
        key = self._key(call)
        if isinstance(outcome, Ready):
            self._refusals.pop(key, None)
            self._programs.setdefault(call.signature, []).append(outcome)
            return outcome
        eager = self.front.guarded is None
        watches = not for_good and (eager or self._stepped_down)
        refusal = Refusal(outcome, self.begin_watch() if watches else None, eager=eager)
        if not eager:
            self._watch = refusal.watch or self._watch  # once the module is another one, it is tried again
        else:
            self.report.strategy = "eager"
        self._refusals[key] = refusal
        self._attempts[key] += 1
        return refusal

    def _key(self, call: Call) -> Any:
        """What a refusal holds for: calls of a signature, or, of a module that is stamped or not, all calls."""
        return call.signature if self.front.guarded is None else None

    def change(self) -> str | None:
        """How the model differs from what was compiled; None when it does not, or was changed back."""
        return self.front.changed(self._watch) if self._watch is not None else None

    def watch(self, begun: Watch | None = None) -> Watch:
        """Find changes from here on, or since a watch was begun: they make programs stale."""
        self._watch = begun or self.begin_watch()
        return self._watch

    def begin_watch(self) -> Watch:
        """What finds changes from here on."""
        return Watch(self.front.model, self.reads, followed=self.front.followed())

    # -- what is compiled in the background ------------------------------------------------------------------

    @property
    def programs(self) -> list[Ready]:
        """All of them."""
        return [ready for some in self._programs.values() for ready in some]

    @property
    def bodies(self) -> InUse:
        """The op bodies that a sequence is to run that begins now."""
        return self.op_bodies.in_use if self.op_bodies is not None else InUse()

    def poll(self, deadline: float | None = None) -> None:
        """Put to use what was compiled in the background; wait for it until `deadline` (`time.monotonic()`)."""
        self.pieces.poll(self.report, deadline)
        if self.op_bodies is not None and self.op_bodies.pending:
            self.op_bodies.poll(deadline)

    def compile_bodies(self) -> None:
        """Compile the bodies of opaque ops, now or in the background. Once."""
        choice = self.options.inside
        if (
            self.op_bodies is not None
            or choice == "eager"
            or self.compiler.name == "eager"
            or self.processes is not None
        ):
            return  # of several processes each would run collectives a number of times of its own
        groups = self.front.groups(self.registry, self.forms)
        if not groups:
            return
        self.op_bodies = Bodies(groups, self.compiler, self.report, self.pieces.store)
        if self.for_others:
            if self._bakes_bodies or choice == "compiled":
                with self.report.phase("inside"):
                    self.op_bodies.compile_for_others()
        elif choice == "auto":
            self.op_bodies.compile_in_background()
        else:
            with self.report.phase("inside"):
                self.op_bodies.compile_here()

    # -- small questions --------------------------------------------------------------------------------------

    @property
    def compares(self) -> bool:
        """Whether a program is compared here as soon as there is one: not where it can't run, as it is made for others,
        nor where several processes compare theirs together, once each has one."""
        return not self.for_others and self.processes is None

    @property
    def proves(self) -> bool:
        """Whether a program that serves here was compared with the model's own forward."""
        return self.compares and self.options.verify == "once"

    @property
    def defers(self) -> bool:
        """Whether pieces that run seldom in a step may start uncompiled."""
        return self.options.ends == "auto" and not self.options.strict and self.processes is None

    def step_down(self, reason: str, layers: tuple[str, ...] = ()) -> None:
        """Record that the layers can't be stamped.

        Raises:
            NotServableError: with `strict`.
        """
        self._stepped_down = True
        reason = f"can't stamp the layers: {reason}"
        if self.options.strict:
            raise NotServableError(f"{reason} (strict=True: no step down)")
        self.report.fall_back(reason, layers, to="hoisted")

    def report_store(self) -> None:
        """Report what the store did so far."""
        if self.records is not None:
            self.report.store = StoreReport.of(self.records.store)

    def why_unused(self, facts: Mapping[str, Any]) -> str:
        """Why a program of another process, whose address was made of these facts, is not used here."""
        apart = differences(facts, self.facts) if facts and self.facts else []
        if apart:
            more = f", and {len(apart) - 4} more" if len(apart) > 4 else ""
            return f"it was built where other things hold: {', '.join(apart[:4])}{more}"
        problems = self.records.store.problems if self.records is not None else []
        return problems[-1] if problems else "it is gone"

    def _open_records(self, store: ArtifactStore | None) -> Records | None:
        """None where nothing can be stored: by a compiler whose pieces have no form on disk, or names in the graphs."""
        if store is None or self.front.about is None or self.options.resolved_identity != "hoisted":
            return None
        if not isinstance(self.compiler, StoringCompiler):
            return None
        return Records.of(self.front.model, self.front.about, store, self.compiler, self.front.device)

    def _open_graphs(self) -> CudaGraphs | None:
        """None where decode steps are recorded in no CUDA graph. Of several processes each would record at a time of
        its own, and ordered ops find their layers in Python."""
        apart = self.for_others or self.distributed or self.options.resolved_identity != "hoisted"
        recorder = recorder_for(self.front.device) if self.options.cuda_graphs == "auto" and not apart else None
        return CudaGraphs(recorder, self._read, self.report) if recorder is not None else None

    def _read(self) -> Reads:
        """What a run may read of the model now."""
        model, layers = self.front.model, [self.registry[name] for name in self.registry]
        return Reads((*model.parameters(), *model.buffers()), tuple(map(vars, layers)))
