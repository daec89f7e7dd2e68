"""Builds a model's program in another process, while this one serves it eager or loads its weights, or from its
configuration alone. What it makes goes into the store; whoever serves the model finds it there, and compares it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from glowplug.background.job import Job, Outcome, Say
from glowplug.compilers import PieceCompiler, get_compiler
from glowplug.compilers.base import StoringCompiler
from glowplug.compilers.environment import differences
from glowplug.errors import NotServableError
from glowplug.forks import Scratch
from glowplug.hf.build import Builder
from glowplug.hf.call import Call, Signature, first_call
from glowplug.hf.weightless import auto_class, weightless_model
from glowplug.options import Options
from glowplug.reasons import why
from glowplug.report import ElsewhereReport, Report
from glowplug.store import open_store


def build_for_others(
    model: PreTrainedModel, options: Options, compiler: PieceCompiler, call: Call | str, *, bodies: bool
) -> Builder:
    """Put the program for a call, and all that it needs, into the store.

    Args:
        model: the model.
        options: as those of the process that will serve it.
        compiler: compiles pieces.
        call: the call, or why there is none.
        bodies: also the op bodies that the serving process would compile beside serving. Without, it is ready sooner.

    Returns:
        What did it. Its report says what was done, or in `fallbacks` why nothing could be. With `ends="auto"`, deferred
        pieces are still being compiled; see `Builder.finish`.
    """
    store = open_store(options.cache_dir) if isinstance(compiler, StoringCompiler) else None
    report = Report(compiler=compiler.name)
    builder = Builder(model, options, compiler, report, store, for_others=True, bakes_bodies=bodies)
    try:
        found = call if isinstance(call, str) else builder.build(call)
    except NotServableError:
        raise
    except Exception as exc:  # whatever it is, whoever serves the model can run it eager
        found = why(exc)
    if isinstance(found, str):
        report.strategy = "eager"
        report.fall_back(found)
    return builder


def bake(model: PreTrainedModel, options: Options, *, bodies: bool = True) -> Builder:
    """The same for the first call of `generate` of a model that `weightless_model` made."""
    return build_for_others(model, options, get_compiler(options.compiler), first_call(model), bodies=bodies)


def bake_configuration(
    say: Say,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    settings: Mapping[str, Any],
    options: Options,
) -> None:
    """A job: the same for a configuration; `settings` as for `weightless_model`."""
    logging.set_verbosity_error()
    _tell(say, bake(weightless_model(config, dtype=dtype, device=device, **settings), options, bodies=False))


def _tell(say: Say, builder: Builder) -> None:
    """Say what came of a build, and finish what is compiled beside."""
    fallbacks = builder.report.fallbacks
    reason = fallbacks[-1].reason if fallbacks else "no program was made"
    say(None if builder.report.programs else reason, **builder.facts)
    builder.finish()


def can_fork(device: torch.device) -> bool:
    """Whether a build may run in a fork of this process: on Linux without a GPU. Dynamo asks a GPU for the state of its
    random numbers, wherever the model is, and a fork of a process that so much as counted GPUs can't."""
    return sys.platform == "linux" and device.type == "cpu" and not torch.accelerator.is_available()


def begin_baking(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, settings: Mapping[str, Any], options: Options
) -> Job:
    """Begin to build a program from a configuration.

    Args:
        config: the configuration.
        dtype: of the weights.
        device: where they are.
        settings: as for `weightless_model`.
        options: how the model is compiled; with a store.
    """
    options = dataclasses.replace(options, background=False)
    if can_fork(device):
        options = dataclasses.replace(options, compiler=get_compiler(options.compiler))  # a fork has one thread
        return Job.fork(lambda say: bake_configuration(say, config, dtype, device, settings, options))
    if not isinstance(options.compiler, str):
        return Job("a compiler of one's own can't be used in a process of its own")
    options = dataclasses.replace(options, ends="compiled")
    return Job.spawn(bake_configuration, config, dtype, device, settings, options)


def why_unused(outcome: Outcome, builder: Builder) -> str:
    """Why the program that a job made was not used by a builder of this process."""
    apart = differences(outcome.facts, builder.facts) if outcome.facts and builder.facts else []
    if apart:
        more = f", and {len(apart) - 4} more" if len(apart) > 4 else ""
        return f"it was built where other things hold: {', '.join(apart[:4])}{more}"
    problems = builder.store.problems if builder.store is not None else []
    return problems[-1] if problems else "it is gone"


def with_store(options: Options) -> tuple[Options, Any]:
    """Options with a store, and what keeps it there: one of this process alone, if there is none."""
    if open_store(options.cache_dir) is not None:
        return options, None
    folder = Scratch("store")
    return dataclasses.replace(options, cache_dir=folder.path), folder


class Background:
    """The background builds of one model, one for each signature of its calls.

    Args:
        model: the model.
        options: how it is compiled; with a store.
        report: receives what happens.
    """

    def __init__(self, model: PreTrainedModel, options: Options, report: Report) -> None:
        self.model = model
        self.options = dataclasses.replace(options, background=False)
        self.report = report
        self._jobs: dict[Signature, Job] = {}

    @property
    def begun(self) -> Collection[Signature]:
        """Signatures for which a build was begun. A fork of the process that began one finds what it makes in the
        store, or begins another."""
        return {signature for signature, job in self._jobs.items() if job.ours}

    def start(self, call: Call) -> None:
        """Begin to build a program for calls like this one, unless that was begun. Called after the call was served,
        which so is not slowed down."""
        if call.signature not in self.begun:
            self.report.elsewhere = ElsewhereReport(eager_calls=1)
            self._jobs[call.signature] = self._begin(call)

    def _begin(self, call: Call) -> Job:
        model, device = self.model, call.inputs.device
        if can_fork(device):
            call = dataclasses.replace(call, cache=None)
            compiler = get_compiler(self.options.compiler)  # made here, as a fork has one thread
            options = self.options

            def build(say: Say) -> None:
                _tell(say, build_for_others(model, options, compiler, call, bodies=False))

            return Job.fork(build, nice=0)  # eager keeps every core busy, and would leave a nice one nothing
        config = model.config
        if auto_class(config)._model_mapping.get(type(config), None) is not type(model):
            return Job(f"no other process can build a {type(model).__name__} from its configuration")
        settings = {"attn_implementation": config._attn_implementation}
        return begin_baking(config, model.dtype, device, settings, self.options)

    def outcome(self, call: Call) -> Outcome | None:
        """What became of the build for calls like this one; None while it is under way, or was not begun."""
        if call.signature not in self.begun:
            return None
        outcome = self._jobs[call.signature].outcome()
        told = self.report.elsewhere
        if told is not None and outcome is None:
            told.eager_calls += 1
        elif told is not None and outcome is not None:
            told.seconds, told.reason = outcome.seconds, outcome.reason
        return outcome

    def wait(self, deadline: float) -> None:
        """Until the builds that were begun have ended, or the deadline (`time.monotonic()`) is over."""
        for job in self._jobs.values():
            job.outcome(deadline)
