"""The front end of transformers: any decoder-only causal language model, through transformers' official interfaces."""

from __future__ import annotations

import contextlib
import functools
import logging
import pkgutil
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from glowplug.bodies import CallForm, Forms, Group, read_forms
from glowplug.compilers import get_compiler
from glowplug.compilers.base import StoringCompiler
from glowplug.errors import ArtifactError, NotStampableError
from glowplug.front import Rung, Target
from glowplug.frontends.hf import discover, trace
from glowplug.frontends.hf.bodies import body_groups
from glowplug.frontends.hf.builds import Builds
from glowplug.frontends.hf.calls import HfCall, cache_argument, first_call, output_type, read_call
from glowplug.frontends.hf.comparison import Comparison
from glowplug.frontends.hf.entries import rotary_layers
from glowplug.frontends.hf.positions import Positions
from glowplug.frontends.hf.sharding import Processes, processes_of, world_text
from glowplug.frontends.hf.steps.attention import step_attention
from glowplug.frontends.hf.steps.decode import GrowingStep, StaticStep, decode_step
from glowplug.graph.capture import Captured, weightless
from glowplug.layers.reads import LOADING
from glowplug.layers.registry import LayerRegistry, register_layers
from glowplug.layers.structure import structure_of
from glowplug.layers.watch import Watch
from glowplug.options import Options
from glowplug.program import Candidate, Program
from glowplug.program import template as templates
from glowplug.program.template import Template
from glowplug.report import Report
from glowplug.runtime.fitness import unfit
from glowplug.store.address import class_modules, sources_of
from glowplug.verify.check import Agree

_FAST_STEPS = ("cuda",)
"""Devices on which attention of one token is not left to the layers' own functions."""
_FEW = 4
"""Token mixers of a model that need no template."""


logger = logging.getLogger("glowplug")


class HfFrontEnd:
    """See `FrontEnd`.

    Args:
        model: a decoder-only causal language model, in eval mode.
        options: how to compile it.
        own: the forward that somebody put on the model before it was compiled. It runs as it is.
    """

    restarts = False
    guarded = None
    smallest = 0
    most_programs: int | None = None

    def __init__(self, model: PreTrainedModel, options: Options, own: Callable[..., Any] | None = None) -> None:
        self.model = model
        self.options = options
        self.own = own
        self._settings: tuple[Any, ...] = ()
        self._attends = True
        self._rehearsal: Comparison | None = None

    # -- calls ------------------------------------------------------------------------------------------------

    @property
    def forward(self) -> Callable[..., Any]:
        """See `FrontEnd.forward`."""
        return self.own if self.own is not None else type(self.model).forward.__get__(self.model)

    def unfit(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """See `FrontEnd.unfit`."""
        model = self.model
        if self.own is not None:
            return unfit(model) or (
                f"before it was compiled the model was given a forward of its own ({_name(self.own)}), which runs as "
                "it is; compile the model first, then wrap model.forward"
            )
        if model.training:
            return "the model is in training mode; call model.eval()"
        if torch.is_grad_enabled():
            given = kwargs.get("inputs_embeds")
            if getattr(given, "requires_grad", False) or any(weight.requires_grad for weight in model.parameters()):
                return "grad mode is on and the model's weights or inputs need gradients; run under torch.no_grad()"
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return "autocast is on; load the model in the dtype that it is to run in"
        return None

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HfCall | str:
        """See `FrontEnd.read`."""
        return read_call(self.model, args, kwargs)

    def first_call(self) -> HfCall | str:
        """See `FrontEnd.first_call`: that of `generate`, for token ids."""
        return first_call(self.model)

    def missing(self, arguments: Sequence[str], call: HfCall) -> str | None:
        """See `FrontEnd.missing`: positions and padding."""
        return trace.fill_in(self.model, self.positions, arguments, call)

    def shapes(self, arguments: Sequence[str], call: HfCall) -> dict[str, tuple[int, ...]]:
        """See `FrontEnd.shapes`."""
        return trace.shapes(arguments, call)

    def inputs(self, arguments: Sequence[str], call: HfCall) -> list[Any]:
        """See `FrontEnd.inputs`."""
        return trace.read_inputs(arguments, call)

    def step(self, call: HfCall) -> StaticStep | GrowingStep | None:
        """See `FrontEnd.step`: one token over a cache."""
        return decode_step(call)

    def wrap(self, returns: type[ModelOutput], call: HfCall, outputs: Sequence[Any]) -> Any:
        """See `FrontEnd.wrap`."""
        output = returns(logits=outputs[0], **{cache_argument(self.model): call.cache})
        return output.to_tuple() if call.return_tuple else output

    # -- the model --------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """See `FrontEnd.device`."""
        return next(self.model.parameters()).device

    @property
    def attend(self) -> Callable[..., Tensor | None] | None:
        """See `FrontEnd.attend`."""
        wanted = self.options.inside != "eager" and self.options.verify != "off"  # a comparison must allow it
        return step_attention if wanted and self._attends and self.device.type in _FAST_STEPS else None

    @property
    def about(self) -> str:
        """See `FrontEnd.about`."""
        layers = getattr(self.model.config.get_text_config(), "num_hidden_layers", "?")
        return f"{type(self.model).__name__}, {layers} layers"

    @property
    def experts(self) -> str:
        """See `FrontEnd.experts`."""
        return self.plan.mode

    @functools.cached_property
    def plan(self) -> discover.ExpertsPlan:
        """What happens to the experts."""
        return discover.plan(self.model, self.options.experts, bodies=self._compiles_bodies)

    @functools.cached_property
    def positions(self) -> Positions:
        """Fills in those that calls leave out."""
        processes = self.processes
        return Positions(self.model, processes.agree if processes is not None else None)

    @functools.cached_property
    def processes(self) -> Processes | None:
        """See `FrontEnd.processes`."""
        return processes_of(self.model)

    @property
    def _compiles_bodies(self) -> bool:
        """Whether opaque experts end up compiled: before the first answer, or in the background, by a fork."""
        beside = self.options.inside == "auto" and sys.platform == "linux"
        compiles = isinstance(get_compiler(self.options.compiler), StoringCompiler)
        return compiles and (beside or self.options.inside == "compiled")

    def register(self) -> LayerRegistry:
        """See `FrontEnd.register`."""
        self._settings = self._read_settings()
        registry = register_layers(self.model, identity=self.options.resolved_identity, layers=self.plan.layers)
        for op, names in self.plan.orders.items():
            registry.set_order(op, names)
        return registry

    def followed(self) -> Iterable[nn.Module]:
        """See `FrontEnd.followed`: rotary embeddings whose tables change with the length of the sequence."""
        return rotary_layers(self.model).values()

    def changed(self, watch: Watch) -> str | None:
        """See `FrontEnd.changed`."""
        if self._read_settings() != self._settings:
            what = "the attention or experts implementation was changed after compiling"
        else:
            reason = watch.change()
            if reason is None:
                return None
            what = f"the model was changed after compiling: {reason}"
        return f"{what}; change it back, or call glowplug.compile(model) again"

    def _read_settings(self) -> tuple[Any, ...]:
        config = self.model.config.get_text_config()
        experts = getattr(config, "_experts_implementation", None)
        return config._attn_implementation, None if experts in discover.SAME_EXPERTS else experts

    def builds(self, report: Report) -> Builds:
        """See `FrontEnd.builds`."""
        return Builds(self, self.options, report)

    # -- tracing ----------------------------------------------------------------------------------------------

    def rungs(self) -> Sequence[Rung]:
        """See `FrontEnd.rungs`."""
        hoisted = self.options.resolved_identity == "hoisted"
        stamps = (True, False) if hoisted and self.options.stamp != "off" else (False,)
        ways = (trace.CUT,) if self.options.resolved_identity == "ordered" else trace.WAYS
        return [Rung(stamped, way, again=way != trace.CUT) for stamped in stamps for way in ways]

    def climbed(self, rung: Rung, report: Report) -> None:
        """See `FrontEnd.climbed`."""
        report.attention = "cut" if rung.way == trace.CUT else "whole"

    def choose(self, read: Collection[str]) -> Template | None:
        """See `FrontEnd.choose`.

        Most models have a template where every attribute tells layers apart, which no trace can overthrow. Only where
        layers differ too much for that are attributes left out that no trace has read.
        """
        strict = discover.stack_of(self.model) if not read else None
        if strict is not None:
            with contextlib.suppress(NotStampableError):
                return templates.choose(strict)
        stack = discover.stack_of(self.model, read)
        if stack is not None:
            return templates.choose(stack)
        if len(discover.token_mixers(self.model)) <= _FEW:
            return None
        raise NotStampableError("the model has no list of layers with one token mixer each")

    def target(self, call: HfCall, model: nn.Module, rung: Rung) -> Target:
        """See `FrontEnd.target`."""
        if rung.way == trace.CUT:
            discover.give_attention_functions(self.model)
        return trace.target(model, call, rung, self.plan)

    def read_forms(self, captured: Captured, registry: LayerRegistry, call: HfCall) -> Forms:
        """See `FrontEnd.read_forms`."""
        return read_forms(captured, registry, trace.masks_of(call))

    def groups(self, registry: LayerRegistry, forms: Forms) -> list[Group]:
        """See `FrontEnd.groups`."""
        return body_groups(registry, forms)

    def returns(self) -> type[ModelOutput]:
        """See `FrontEnd.returns`: the class of the model's output."""
        return output_type(self.model)

    # -- checking ---------------------------------------------------------------------------------------------

    def rehearsal(
        self, call: HfCall, registry: LayerRegistry, *, check_order: bool
    ) -> Callable[[Program], None] | None:
        """See `FrontEnd.rehearsal`: on a GPU, where a helper compiles the pieces."""
        self._rehearsal = None
        alone = call.device.type == "cuda" and self.processes is None and not weightless(self.model)
        if not alone or self.options.verify == "off":
            return None
        self._rehearsal = Comparison(self, call, registry, self.returns(), check_order=check_order)
        return self._rehearsal.rehearse

    def compare(
        self, candidate: Candidate, call: HfCall, registry: LayerRegistry, agree: Agree | None, *, check_order: bool
    ) -> tuple[str | None, type[ModelOutput]]:
        """See `FrontEnd.compare`."""
        if self.options.verify == "off":
            return None, candidate.returns
        comparison = self._rehearsal if candidate.traced is not None else None
        self._rehearsal = None
        if comparison is None:
            returns, proved = candidate.returns, candidate.proved
            comparison = Comparison(self, call, registry, returns, check_order=check_order, proved=proved)
        reason = comparison.why_wrong(candidate, agree)
        if comparison.attend is not None and comparison.attend.problem is not None:
            self._attends = False
            problem = comparison.attend.problem
            logger.warning("glowplug: attention of one token runs the layers' own functions: %s", problem)
        return reason, comparison.returns

    # -- the store --------------------------------------------------------------------------------------------

    def facts(self, call: HfCall) -> dict[str, Any]:
        """See `FrontEnd.facts`."""
        model, plan, signature = self.model, self.plan, call.signature
        return {
            "structure of the model": structure_of(model, LOADING, followed=self.followed()),
            "code of the model": {f"source of {name}": text for name, text in sources_of(class_modules(model)).items()},
            "transformers": transformers.__version__,
            "call": repr(replace(signature, device=torch.device(signature.device.type))),
            "number of the device": signature.device.index or 0,  # pieces hold the device that they run on
            "processes": world_text(self.processes),
            "experts": [plan.mode, plan.implementation, sorted(plan.blocks), sorted(plan.routed)],
        }

    def to_record(self, returns: type[ModelOutput], forms: Forms) -> dict[str, Any]:
        """See `FrontEnd.to_record`."""
        return {
            "output": f"{returns.__module__}:{returns.__qualname__}",
            "forms": {name: form.to_facts() if form is not None else None for name, form in forms.items()},
            "attends": self._attends,
        }

    def from_record(self, facts: Mapping[str, Any]) -> tuple[type[ModelOutput], Forms]:
        """See `FrontEnd.from_record`."""
        output: Any = pkgutil.resolve_name(facts["output"])
        if not (isinstance(output, type) and issubclass(output, ModelOutput)):
            raise ArtifactError(f"{facts['output']} is no class of outputs")
        if facts["attention"] == "cut":
            discover.give_attention_functions(self.model)
        self._attends = self._attends and facts["attends"]
        forms = {name: CallForm.from_facts(form) if form else None for name, form in facts["forms"].items()}
        return output, forms


def _name(forward: Any) -> str:
    """What a forward is called, for a reason."""
    named = getattr(forward, "func", forward)
    return str(getattr(named, "__qualname__", type(named).__name__)).replace("<locals>.", "")
