"""Compares programs of one model with its own forward before they serve, and watches the model from then on."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Set
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from glowplug.hf.attention_kinds import Forms, observed
from glowplug.hf.caches import new_cache
from glowplug.hf.call import Call
from glowplug.hf.cases import CLASSES, Classes, sequences
from glowplug.hf.positions import Positions
from glowplug.hf.rotary_entry import rotary_layers, rotary_state_kept
from glowplug.hf.served import Served
from glowplug.hf.sharding import Processes
from glowplug.layers.registry import LayerRegistry
from glowplug.layers.watch import Watch
from glowplug.options import Options
from glowplug.program import Program
from glowplug.report import Report
from glowplug.verify.check import Case, why_wrong


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
        forms: how the model's own attention functions were called, by layer.
    """

    def __init__(
        self, model: PreTrainedModel, options: Options, report: Report, reads: Set[str], processes: Processes | None
    ) -> None:
        self.model = model
        self.options = options
        self.report = report
        self.watch: Watch | None = None
        self.check_order = True
        self.forms: Forms = {}
        self._reads = reads
        self._agree = processes.agree if processes is not None else None
        self.positions = Positions(model, self._agree)

    def start_watching(self) -> Watch:
        """Find changes from here on: they make programs stale."""
        self.watch = Watch(self.model, self._reads, followed=rotary_layers(self.model).values())
        return self.watch

    def prove(
        self, served: Served, graphs: Program | None, call: Call, registry: LayerRegistry, classes: Classes
    ) -> str | None:
        """Compare a program with eager.

        Args:
            served: the program.
            graphs: its form with uncompiled pieces, if any; of several processes all have one, or none.
            call: a call that it is to serve.
            registry: the layers that its ops find.
            classes: the sizes to compare.

        Returns:
            Why it must not serve, or None.
        """
        for attempt in range(2):
            watch = self.start_watching()
            if self.options.verify == "off":
                break
            with self.report.phase("verify"), observed(self.model, self.forms), rotary_state_kept(self.model):
                cases = self._cases(served, call, registry, classes)
                problem = why_wrong(served.program, graphs, cases, self._agree)
            if problem is not None:
                return problem
            changed = watch.change()
            changed = self._agree(changed) if self._agree is not None else changed
            if changed is None:
                break
            if attempt == 1:  # the first run may set up what later ones find
                return f"the model's own forward changes the model each time that it runs: {changed}"
        served.find_graphs = None
        return None

    def _cases(self, served: Served, call: Call, registry: LayerRegistry, classes: Classes) -> Iterator[Case]:
        # Positions of several axes are given; what a model makes of a call without them, it is asked beforehand.
        asked = classes is CLASSES and not call.signature.position_lead
        unsaid = asked and self.positions.found.unmasked is not None
        for model, steps in sequences(self.model, call, classes, unsaid=unsaid):
            cache = new_cache(model)
            for step in steps:
                served.output_type = type(step.output)
                run = functools.partial(self._run, served, registry, replace(step.call, cache=cache))
                yield Case(step.what, step.output.logits, run)

    def _run(self, served: Served, registry: LayerRegistry, call: Call, program: Program) -> Any:
        return served.run(call, registry, program=program, check_order=self.check_order).logits
