"""Builds a model's program in another process, while this one serves it eager or loads its weights.

On a CPU the other process is a fork, which has the model already. What it makes goes through the store; this process
finds it there, compares it with eager, and takes over.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig

from glowplug.compilers.fork import Beside, leave
from glowplug.hf.build import Builder
from glowplug.options import Options
from glowplug.reasons import why
from glowplug.report import Report

RESULT = "result.json"
_WORKER = "glowplug.hf.build_process"


@dataclass(frozen=True)
class Outcome:
    """What became of a build elsewhere.

    Attributes:
        reason: why there is no program; None when there is one.
        seconds: what it took there.
    """

    reason: str | None
    seconds: float

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


class Elsewhere(Protocol):
    """A build in another process."""

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
        self._beside = Beside(lambda folder: attempt(build, folder), nice=nice)

    def outcome(self, deadline: float | None = None) -> Outcome | None:
        """See `Elsewhere.outcome`."""
        if not self._beside.started:
            return Outcome("the machine allows no further process", 0.0)
        if self._outcome is None and self._beside.wait_for(RESULT, deadline if deadline is not None else 0.0):
            self._outcome = Outcome.read(self._beside.folder / RESULT)
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
        self._folder = tempfile.TemporaryDirectory(prefix="glowplug-build-", ignore_cleanup_errors=True)
        folder = Path(self._folder.name)
        config.save_pretrained(folder)
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
        weakref.finalize(self, self._process.kill)

    def outcome(self, deadline: float | None = None) -> Outcome | None:
        """See `Elsewhere.outcome`."""
        if self._outcome is None:
            if deadline is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(max(deadline - time.monotonic(), 0))
            if self._process.poll() is not None:
                self._outcome = Outcome.read(Path(self._folder.name, RESULT))
                self._folder.cleanup()
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
    leave(folder / RESULT, Outcome(reason, round(time.perf_counter() - start, 3)).to_bytes())
    if builder is not None:
        builder.finish()


def _why(report: Report) -> str:
    return report.fallbacks[-1].reason if report.fallbacks else "no program was made"


def can_fork(device: torch.device) -> bool:
    """Whether a build may run in a fork of this process: on Linux without a GPU. Dynamo asks a GPU for the state of its
    random numbers, wherever the model is, and a fork of a process that so much as counted GPUs can't."""
    return sys.platform == "linux" and device.type == "cpu" and not torch.accelerator.is_available()
