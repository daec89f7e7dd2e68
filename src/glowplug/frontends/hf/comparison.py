"""Compares programs with a transformers model's own forward, before they serve."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import ModelOutput

from glowplug.errors import NotServableError
from glowplug.frontends.hf import cases, discover
from glowplug.frontends.hf.caches import new_cache
from glowplug.frontends.hf.calls import HfCall
from glowplug.frontends.hf.entries import rotary_state_kept
from glowplug.frontends.hf.steps.attention import CheckedAttention, without_plans
from glowplug.layers.context import ForwardContext
from glowplug.layers.registry import LayerRegistry
from glowplug.ops.expert_linear import without_kernel
from glowplug.program import Candidate, Program
from glowplug.ready import run_program
from glowplug.verify.check import Agree, Case, Rehearsal, rehearse, why_wrong

if TYPE_CHECKING:
    from glowplug.frontends.hf.front import HfFrontEnd


class Comparison:
    """One comparison of a program with its model.

    Args:
        front: the model's front end.
        call: a call that the program is to serve.
        registry: the model's layers.
        returns: the class of the model's output, as far as it is known before.
        check_order: with `identity="ordered"`, whether a wrong order raises.
        proved: whether an earlier process has compared this program in every case.

    Attributes:
        returns: the class of the model's output.
        attend: what was found out about attention of one token; None if layers attend by their own functions.
    """

    def __init__(
        self,
        front: HfFrontEnd,
        call: HfCall,
        registry: LayerRegistry,
        returns: type[ModelOutput],
        *,
        check_order: bool,
        proved: bool = False,
    ) -> None:
        self.returns = returns
        self.attend = CheckedAttention() if front.attend is not None and not proved else None
        self._front = front
        self._call = call
        self._registry = registry
        self._check_order = check_order
        self._proved = proved
        self._rehearsal: Rehearsal | None = None

    def rehearse(self, uncompiled: Program) -> None:
        """Do all that needs no compiled piece. What fails here fails again in `why_wrong`, and is reported there."""
        if torch.compiler.is_compiling():
            return
        with contextlib.suppress(Exception), self._undisturbed():
            self._rehearsal = rehearse(self._as_eager(uncompiled), self._cases())

    def why_wrong(self, candidate: Candidate, agree: Agree | None) -> str | None:
        """Why a program must not serve; None if it may. See `glowplug.verify.check.why_wrong`."""
        program = candidate.program
        if self._rehearsal is not None and self._rehearsal.is_of(program) and agree is None:
            return self._rehearsal.why_wrong(program)
        graphs = candidate.graphs()
        uncompiled = self._as_eager(graphs) if graphs is not None else None
        with self._undisturbed():
            return why_wrong(program, uncompiled, self._cases(), agree, once=self._proved)

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        with rotary_state_kept(self._front.model), without_plans():
            yield

    def _as_eager(self, graphs: Program) -> Program:
        """Uncompiled pieces with the model's own experts: a deep model of half precision amplifies the smallest
        difference in rounding."""
        if self._front.plan.implementation != discover.BY_EXPERT:
            return graphs
        return graphs.with_slots({slot: without_kernel()(run) for slot, run in graphs.slots.items()})

    def _cases(self) -> Iterator[Case]:
        """Run the model's own forward in each case."""
        front, call = self._front, self._call
        classes = cases.GLANCE if self._proved else cases.CLASSES
        # Positions of several axes are given; what a model makes of a call without them, it is asked beforehand.
        asks = not self._proved and not call.signature.position_lead
        bare = asks and front.positions.rules.unmasked is not None
        for model, steps in cases.sequences(front.model, call, classes, bare=bare):
            cache = new_cache(model)
            for step in steps:
                self.returns = type(step.output)
                run = functools.partial(self._logits, replace(step.call, cache=cache))
                yield Case(step.what, step.output.logits, run)

    def _logits(self, call: HfCall, program: Program) -> Any:
        missing = self._front.missing(program.arguments, call)
        if missing is not None:
            raise NotServableError(missing)
        context = ForwardContext(self._registry, call.cache, self._check_order, attend=self.attend)
        return run_program(self._front, program, call, context)[0]
