"""Builds a model's program in another process, while this one serves it eager or loads its weights.

On a CPU the other process is a fork, which has the model already. What it makes goes through the store; this process
finds it there, compares it with eager, and takes over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig

from glowplug.compilers.environment import differences, read_switches
from glowplug.compilers.fork import Beside, leave
from glowplug.forks import Scratch, finalize
from glowplug.hf.build import Builder
from glowplug.options import Options
from glowplug.reasons import why
from glowplug.report import Report

logger = logging.getLogger("glowplug")

RESULT = "result.json"
CONFIG = "config"
"""The file with the configuration as it is: read back from JSON it has attributes that one made in Python lacks."""
SWITCHES = "switches"
"""The file with the process-wide switches of whoever wants a build."""
_WORKER = "glowplug.hf.build_process"
TIMEOUT_VARIABLE = "GLOWPLUG_BUILD_TIMEOUT"
"""The environment variable that says how long a build in another process may take, in seconds."""
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Outcome:
    """What became of a build elsewhere.

    Attributes:
        reason: why there is no program; None when there is one.
        seconds: what it took there.
        facts: what its address was made of there, by name.
    """

    reason: str | None
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)

    def unused(self, builder: Builder) -> str:
        """Why the program that it made was not used by a builder of this process."""
        apart = differences(self.facts, builder.facts) if self.facts and builder.facts else []
        if apart:
            more = f", and {len(apart) - 4} more" if len(apart) > 4 else ""
            return f"it was built where other things hold: {', '.join(apart[:4])}{more}"
        problems = builder.store.problems if builder.store is not None else []
        return problems[-1] if problems else "it is gone"

    def to_bytes(self) -> bytes:
        """Its form in a file."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def read(cls, path: Path) -> Outcome:
        """What a process left behind."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return cls("the process that was to build the program died", 0.0)


class Patience:
    """How long a build may take, from now on: `GLOWPLUG_BUILD_TIMEOUT`, or ten minutes."""

    def __init__(self) -> None:
        text = os.environ.get(TIMEOUT_VARIABLE, "").strip()
        if text and not text.isdecimal():
            logger.warning("glowplug: %s=%r is no whole number of seconds, and is not used", TIMEOUT_VARIABLE, text)
        self.seconds = float(text) if text.isdecimal() else _TIMEOUT_S
        self.deadline = time.monotonic() + self.seconds

    @property
    def over(self) -> bool:
        """Whether it is."""
        return time.monotonic() >= self.deadline

    def outcome(self) -> Outcome:
        """What became of a build that took longer."""
        why = f"it did not answer within {self.seconds:g} s ({TIMEOUT_VARIABLE}), and was given up"
        return Outcome(why, self.seconds)


class Elsewhere(Protocol):
    """A build in another process. One that takes longer than it may is ended, and came to nothing."""

    def outcome(self, deadline: float | None = None) -> Outcome | None:
        """What became of it; None while it is under way. Waits until `deadline` (`time.monotonic()`), if given."""
        ...


class Forked:
    """A build in a fork of this process. It says so when there is a program, and goes on until its ends are compiled.

    Args:
        build: makes the program and stores it.
        nice: how much the fork yields to this process.
    """

    def __init__(self, build: Callable[[], Builder], *, nice: int = 10) -> None:
        self._outcome: Outcome | None = None
        self._patience = Patience()
        self._beside = Beside(lambda folder: attempt(build, folder), nice=nice)

    def outcome(self, deadline: float | None = None) -> Outcome | None:
        """See `Elsewhere.outcome`."""
        if not self._beside.started:
            return Outcome("the machine allows no further process", 0.0)
        if self._outcome is None:
            if self._beside.wait_for(RESULT, min(deadline or 0.0, self._patience.deadline)):
                self._outcome = Outcome.read(self._beside.folder / RESULT)
            elif self._patience.over:
                self._beside.give_up()
                self._outcome = self._patience.outcome()
        return self._outcome


class Spawned:
    """A build in a process of its own, from a model's configuration: where this one uses a GPU already, or can't fork.

    Args:
        config: the configuration.
        dtype: of the weights.
        device: where they are.
        settings: as for `weightless_model`.
        options: how the model is compiled.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        device: torch.device,
        settings: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        self._outcome: Outcome | None = None
        self._patience = Patience()
        self._scratch = Scratch("build")
        folder = self._scratch.path
        config.save_pretrained(folder)
        with contextlib.suppress(Exception):  # one of somebody's own code may have no such form
            (folder / CONFIG).write_bytes(pickle.dumps(config))
        (folder / SWITCHES).write_bytes(read_switches())
        asked = {
            "folder": str(folder),
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
            "settings": dict(settings),
            "options": dict(options),
        }
        with (folder / "said").open("w") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _WORKER, json.dumps(asked)],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )
        finalize(self, self._process.kill)

    def outcome(self, deadline: float | None = None) -> Outcome | None:
        """See `Elsewhere.outcome`."""
        if self._outcome is None:
            if deadline is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(max(min(deadline, self._patience.deadline) - time.monotonic(), 0))
            if self._process.poll() is not None:
                self._outcome = Outcome.read(self._scratch.path / RESULT)
            elif self._patience.over:
                self._process.kill()
                self._outcome = self._patience.outcome()
            if self._outcome is not None:
                self._scratch.cleanup()
        return self._outcome


_OPTIONS = ("identity", "experts", "compiler", "stamp")
"""What a process of its own is told of the options; it compiles everything before it says so."""


def spawn(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, settings: Mapping[str, Any], options: Options
) -> Elsewhere | str:
    """Begin a build in a process of its own, see `Spawned`; or why there can be none."""
    if not isinstance(options.compiler, str):
        return "a compiler of one's own can't be used in a process of its own"
    asked = {name: getattr(options, name) for name in _OPTIONS}
    asked |= {"cache_dir": str(options.cache_dir) if options.cache_dir is not None else None, "ends": "compiled"}
    return Spawned(config, dtype, device, settings, asked)


def attempt(build: Callable[[], Builder], folder: Path) -> None:
    """Build, whatever comes of it; leave the outcome in a folder, and finish what is compiled beside."""
    start = time.perf_counter()
    builder: Builder | None = None
    try:
        builder = build()
        reason = None if builder.report.programs else _why(builder.report)
    except Exception as exc:
        reason = why(exc)
    facts = builder.facts if builder is not None else {}
    leave(folder / RESULT, Outcome(reason, round(time.perf_counter() - start, 3), facts).to_bytes())
    if builder is not None:
        builder.finish()


def _why(report: Report) -> str:
    return report.fallbacks[-1].reason if report.fallbacks else "no program was made"


def can_fork(device: torch.device) -> bool:
    """Whether a build may run in a fork of this process: on Linux without a GPU. Dynamo asks a GPU for the state of its
    random numbers, wherever the model is, and a fork of a process that so much as counted GPUs can't."""
    return sys.platform == "linux" and device.type == "cpu" and not torch.accelerator.is_available()
