"""Proves programs of one model equal to its own forward before they serve, and watches the model from then on."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from transformers import PreTrainedModel

from glowplug.hf import verify
from glowplug.hf.call import Call
from glowplug.hf.locate import first_layer
from glowplug.hf.positions import Positions
from glowplug.hf.rotary_entry import rotary_layers, rotary_state_kept
from glowplug.hf.served import Served
from glowplug.hf.sharding import Processes
from glowplug.layers.registry import LayerRegistry
from glowplug.layers.stack import LayerStack
from glowplug.layers.watch import Watch
from glowplug.options import Options
from glowplug.program import Program
from glowplug.report import Report


class Prover:
    """Compares programs with eager.

    Args:
        model: the model.
        options: `verify` says whether to compare.
        report: receives what it cost.
        reads: sources of everything in Python that the programs depend on; grows with them.
        processes: those that run the model together, which compare in step.

    Attributes:
        watch: finds changes of the model since a program was last compared.
        check_order: with `identity="ordered"`, whether a wrong order raises.
        positions: fills in those that calls leave out, as the model does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: Options,
        report: Report,
        reads: Set[str],
        processes: Processes | None,
    ) -> None:
        self.model = model
        self.options = options
        self.report = report
        self.watch: Watch | None = None
        self.check_order = True
        self._reads = reads
        self._agree = processes.agree if processes is not None else None
        self.positions = Positions(model, self._agree)

    def start_watching(self) -> Watch:
        """Find changes from here on: they make programs stale."""
        self.watch = Watch(self.model, self._reads, followed=rotary_layers(self.model).values())
        return self.watch

    def prove(
        self, served: Served, call: Call, registry: LayerRegistry, classes: verify.Classes, *, exact: bool
    ) -> verify.Problem | None:
        """Compare a program with eager.

        Args:
            served: the program.
            call: a call that it is to serve.
            registry: the layers that its ops find.
            classes: the sizes to compare.
            exact: whether to compare its form with uncompiled pieces, too.

        Returns:
            Why it must not serve, or None.
        """
        for attempt in range(2):
            watch = self.start_watching()
            if self.options.verify == "off":
                break
            with self.report.phase("verify"), rotary_state_kept(self.model):
                problem = self._compare(served, call, registry, classes, exact=exact)
            if problem is not None:
                return problem
            changed = watch.change()
            changed = self._agree(changed) if self._agree is not None else changed
            if changed is None:
                break
            if attempt == 1:  # the first run may set up what later ones find
                return verify.Problem(f"the model's own forward changes the model each time that it runs: {changed}")
        served.uncompiled = served.find_uncompiled = None
        return None

    def first_layer(
        self, served: Served, stack: LayerStack, problem: verify.Problem, registry: LayerRegistry
    ) -> int | None:
        """The first layer at which a stamped program differs, for the report; None when it can't be told."""
        if problem.call is None:
            return None
        (call, arguments), model = problem.call, problem.model or self.model

        def run_program(program: Program) -> Any:
            return served.run(call, registry, program=program)

        def run_eager() -> Any:
            with torch.no_grad():
                return type(model).forward(model, **arguments)

        return first_layer(served.uncompiled or served.program, stack, run_program, run_eager)

    def _compare(
        self, served: Served, call: Call, registry: LayerRegistry, classes: verify.Classes, *, exact: bool
    ) -> verify.Problem | None:
        def run(ready: Call) -> Any:
            return served.run(ready, registry, check_order=self.check_order)

        def run_uncompiled(ready: Call) -> Any:
            return served.run(ready, registry, program=served.uncompiled)

        def run_by_pieces(ready: Call) -> tuple[Any, str | None] | None:
            return served.try_pieces(ready, registry)

        # Of a model that several processes run together, all must have uncompiled pieces, or none uses them. Ops that
        # count their calls can't be replayed.
        replays = self.options.resolved_identity != "ordered" and (exact or self._agree is None)
        by_pieces = run_by_pieces if replays else None
        candidates = [verify.Candidate(run, exact=False, by_pieces=by_pieces)]
        if exact:  # without a form of its own, the program's pieces are uncompiled
            candidates.insert(0, verify.Candidate(run_uncompiled, exact=True))

        def note(found: type) -> None:
            served.output_type = found

        # Positions of several axes are given; what a model makes of a call without them, it is asked beforehand.
        asked = classes is verify.CLASSES and not call.signature.position_lead
        unsaid = asked and self.positions.found.unmasked is not None
        return verify.compare(self.model, call, candidates, note, classes, self._agree, unsaid)
