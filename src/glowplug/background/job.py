"""Jobs: work that another process does for this one, a fork of it or, where it must not fork, a new process.

A fork has the whole trace in memory at once; a new process must import torch and be sent what it works on. What a job
makes goes into an artifact store, and into nothing else. What it has to say, its outcome, is a file of its folder.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from glowplug.compilers.environment import read_switches
from glowplug.reasons import why
from glowplug.runtime.forks import Scratch, finalize, fork_plainly

logger = logging.getLogger("glowplug")

TIMEOUT_VARIABLE = "GLOWPLUG_BUILD_TIMEOUT"
"""The environment variable that says how long a job may take, in seconds."""
_TIMEOUT_S = 600.0
_DEATH_S = 10.0
"""How long a killed process may take to end."""
_WORKER = "glowplug.background.worker"
WORK, SWITCHES = "work", "switches"
"""Files for a new process: what it is to do, and the process-wide switches of whoever wants it done."""
_OUTCOME = "outcome"


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        reason: why it came to nothing; None when it did its work.
        seconds: what it took.
        facts: whatever else it said.
    """

    reason: str | None
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


class Say(Protocol):
    """Says what became of a job, the first time that it is called. The work may go on afterwards."""

    def __call__(self, reason: str | None = None, **facts: Any) -> None:
        """Args: as the attributes of `Outcome`; `facts` are JSON."""
        ...


class _Fork:
    """A fork, as `subprocess.Popen` has a process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        if self._code is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self._code = os.waitstatus_to_exitcode(status) if pid else None
            except ChildProcessError:  # somebody else has waited for it
                self._code = 0
        return self._code

    def kill(self) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


Process = _Fork | subprocess.Popen[bytes]


class Job:
    """Work that another process does. It is ended when this object goes, but never by a fork of the process that began
    it; and one that takes too long is given up.

    Args:
        begin: begins the process, given the job's folder; or why there can be none.
    """

    def __init__(self, begin: Callable[[Path], Process] | str) -> None:
        for job in list(_jobs):
            job._poll()  # the system keeps an entry of each process that has ended until somebody asks
        self._process: Process | None = None
        self._outcome = Outcome(begin) if isinstance(begin, str) else None
        self._begun = time.monotonic()
        self._limit = _time_limit()
        if isinstance(begin, str):
            return
        try:
            self._scratch = Scratch("job")
            self._process = begin(self._scratch.path)
        except Exception as exc:  # no room for one more process, or its work can't be written down
            self._outcome = Outcome(f"no other process can be begun: {why(exc)}")
            return
        finalize(self, functools.partial(_end, self._process))
        _jobs.add(self)

    @classmethod
    def fork(cls, work: Callable[[Say], None], *, nice: int = 10) -> Job:
        """Begin to work in a fork of this process, silently.

        It must not touch a GPU, nor run a parallel region of OpenMP: this process's threads do not exist there.

        Args:
            work: is given what says the job's outcome. What it raises before it has said anything is the outcome.
            nice: how much the fork yields to other processes, as `os.nice` has it.
        """
        return cls(functools.partial(_fork, work, nice))

    @classmethod
    def spawn(cls, work: Callable[..., None], *arguments: Any) -> Job:
        """The same in a new process, which has the switches of this one: `work(say, *arguments)`, pickled."""

        def begin(folder: Path) -> Process:
            (folder / WORK).write_bytes(pickle.dumps((work, arguments)))
            (folder / SWITCHES).write_bytes(read_switches())
            quiet = subprocess.DEVNULL
            command = [sys.executable, "-m", _WORKER, str(folder)]
            return subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)

        return cls(begin)

    @property
    def ours(self) -> bool:
        """Whether this process began it. A fork of that one must not wait for it: it finds in the store what the job
        makes, or makes its own."""
        return self._process is None or self._scratch.ours

    def ended(self, deadline: float | None = None) -> bool:
        """Whether it has ended, as far as this process can tell. Waits until `deadline` (`time.monotonic()`)."""
        return self._wait(self._poll, deadline)

    def outcome(self, deadline: float | None = None) -> Outcome | None:
        """What it said; None while it has said nothing. Waits until `deadline` (`time.monotonic()`)."""
        if self._outcome is None and self._wait(lambda: self._path.exists() or self._poll(), deadline):
            self._outcome = self._outcome or self._read("the other process died")
        return self._outcome

    def stop(self) -> None:
        """End it now."""
        if self._process is not None and self.ours:
            _end(self._process)

    @property
    def _path(self) -> Path:
        return self._scratch.path / _OUTCOME

    def _poll(self) -> bool:
        return self._process is None or not self.ours or self._process.poll() is not None

    def _wait(self, condition: Callable[[], bool], deadline: float | None) -> bool:
        pause = 0.001
        while not condition():
            if time.monotonic() >= self._begun + self._limit:
                self.stop()
                late = f"it did not answer within {self._limit:g} s ({TIMEOUT_VARIABLE}), and was given up"
                self._outcome = self._outcome or self._read(late)
                return True
            if time.monotonic() >= (deadline or 0.0):
                return False
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)
        return True

    def _read(self, otherwise: str) -> Outcome:
        try:
            return Outcome(**json.loads(self._path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return Outcome(otherwise, round(time.monotonic() - self._begun, 3))


_jobs: weakref.WeakSet[Job] = weakref.WeakSet()
_parent = 0


def _fork(work: Callable[[Say], None], nice: int, folder: Path) -> Process:
    with warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads. The child touches none of their locks, and is waited for in time.
        warnings.simplefilter("ignore", DeprecationWarning)
        here = os.getpid()
        pid = fork_plainly()
    if pid == 0:  # the child; never returns
        code = 1
        try:
            global _parent
            _parent = here
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with open(os.devnull, "w") as quiet:
                os.dup2(quiet.fileno(), 1)
                os.dup2(quiet.fileno(), 2)
            torch.set_num_threads(1)
            os.nice(nice)
            do(work, folder)
            code = 0
        finally:
            os._exit(code)
    return _Fork(pid)


def do(work: Callable[[Say], None], folder: Path) -> None:
    """Do a job's work in this process, whatever comes of it.

    Args:
        work: as for `Job.fork`.
        folder: the job's. What this process has no time to delete goes with it.
    """
    Scratch.home = str(folder)
    start = time.perf_counter()

    def say(reason: str | None = None, **facts: Any) -> None:
        path = folder / _OUTCOME
        if not path.exists():  # whole or not at all
            outcome = Outcome(reason, round(time.perf_counter() - start, 3), facts)
            path.with_suffix(".part").write_text(json.dumps(asdict(outcome)))
            path.with_suffix(".part").rename(path)

    try:
        work(say)
        say()
    except Exception as exc:
        say(why(exc))
    finally:
        if orphaned():  # nobody else is left to do it
            shutil.rmtree(folder, ignore_errors=True)


def orphaned() -> bool:
    """Whether this is a job whose owner's process has ended: then nobody waits for what it makes."""
    return _parent != 0 and os.getppid() != _parent


def _end(process: Process) -> None:
    if process.poll() is None:
        process.kill()
        deadline = time.monotonic() + _DEATH_S
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)


def _time_limit() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, "").strip()
    if text and not text.isdecimal():
        logger.warning("glowplug: %s=%r is no whole number of seconds, and is not used", TIMEOUT_VARIABLE, text)
    return float(text) if text.isdecimal() else _TIMEOUT_S
