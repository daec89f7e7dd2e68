"""Serves a model eager while its program is built in another process, and says when the program can take over."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedModel

from glowplug.compilers import get_compiler
from glowplug.forks import Scratch
from glowplug.hf.background import Elsewhere, Forked, Outcome, can_fork, spawn
from glowplug.hf.build import Builder
from glowplug.hf.call import Call, Signature
from glowplug.hf.weightless import auto_class
from glowplug.options import Options
from glowplug.report import ElsewhereReport, Report
from glowplug.store import open_store


def with_store(options: Options) -> tuple[Options, Any]:
    """Options with a store, and what keeps it there: one of this process alone, if there is none."""
    if open_store(options.cache_dir) is not None:
        return options, None
    folder = Scratch("store")
    return dataclasses.replace(options, cache_dir=folder.path), folder


def rebuild(model: PreTrainedModel, options: Options, call: Call) -> Elsewhere | None:
    """Begin to make the program for a call anew in a fork, where `can_fork`, and store what it lacks in the store; None
    when the machine allows none."""
    try:
        return _fork(model, dataclasses.replace(options, background=False), call, nice=10, unfinished=False)
    except OSError:  # such as a full disk
        return None


def _fork(model: PreTrainedModel, options: Options, call: Call, *, nice: int, unfinished: bool) -> Forked:
    """Begin to build the program for a call in a fork.

    Args:
        model: the model.
        options: how it is compiled; with a store.
        call: the call.
        nice: how much the fork yields to this process.
        unfinished: whether a stored program will do that has pieces which nobody has finished.
    """
    call = dataclasses.replace(call, cache=None)
    compiler = get_compiler(options.compiler)  # made here, as a fork has one thread

    def build() -> Builder:
        builder = Builder(model, options, compiler, Report(), open_store(options.cache_dir))
        builder.for_others, builder.bakes_bodies = True, False  # nobody is to wait for those
        builder.rebuild = _leave_unfinished if unfinished else None
        found = builder.build(call)
        if isinstance(found, str):
            builder.report.fall_back(found)
        return builder

    return Forked(build, nice=nice)


def _leave_unfinished(call: Call) -> None:
    """The process that serves the program will have it finished."""


class Background:
    """The builds of one model in other processes, one for each signature of its calls.

    Args:
        model: the model.
        options: how it is compiled; with a store.
        report: receives what happens.
    """

    def __init__(self, model: PreTrainedModel, options: Options, report: Report) -> None:
        self.model = model
        self.options = options
        self.report = report
        self._begun: dict[Signature, Elsewhere | str] = {}
        self._process = os.getpid()

    @property
    def _builds(self) -> dict[Signature, Elsewhere | str]:
        """The builds of this process. A fork of it has none: it finds what they make in the store, or begins others."""
        if self._process != os.getpid():
            self._begun, self._process = {}, os.getpid()
        return self._begun

    @property
    def begun(self) -> Collection[Signature]:
        """Signatures for which a build was begun."""
        return self._builds.keys()

    def start(self, call: Call) -> None:
        """Begin to build a program for calls like this one, unless that was begun. Called after the call was served,
        which so is not slowed down."""
        if call.signature in self._builds:
            return
        self.report.elsewhere = ElsewhereReport(eager_calls=1)
        try:
            self._builds[call.signature] = self._begin(call)
        except OSError as exc:  # such as a full disk; the call was served
            self._builds[call.signature] = f"no other process can be given the model: {exc.strerror or exc}"

    def _begin(self, call: Call) -> Elsewhere | str:
        options = dataclasses.replace(self.options, background=False)
        if can_fork(call.inputs.device):
            # Eager keeps every core busy, and would leave a nice one nothing.
            return _fork(self.model, options, call, nice=0, unfinished=True)
        config = self.model.config
        if auto_class(config)._model_mapping.get(type(config), None) is not type(self.model):
            return f"no other process can build a {type(self.model).__name__} from its configuration"
        settings = {"attn_implementation": config._attn_implementation}
        return spawn(config, self.model.dtype, call.inputs.device, settings, options)

    def outcome(self, call: Call) -> Outcome | None:
        """What became of the build for calls like this one; None while it is under way, or was not begun."""
        build = self._builds.get(call.signature)
        found = Outcome(build, 0.0) if isinstance(build, str) else build.outcome() if build is not None else None
        told = self.report.elsewhere
        if found is None and build is not None and told is not None:
            told.eager_calls += 1
        if found is not None and told is not None:
            told.seconds, told.reason = found.seconds, found.reason
        return found

    def wait(self, deadline: float) -> None:
        """Until the builds that were begun have ended, or the deadline (`time.monotonic()`) is over."""
        for build in self._builds.values():
            if not isinstance(build, str):
                build.outcome(deadline)
