"""Jobs: work that another process does for this one. It is a fork or, where forking is not safe, a new process.

A fork has the whole trace in memory from the start. A new process must import torch first and gets its work pickled.
A job hands over its results only through an artifact store, and reports its outcome in a file in the job's folder.
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
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from glowplug.compilers.environment import read_switches
from glowplug.reasons import why
from glowplug.runtime.forks import Scratch, finalize, fork_plainly
from glowplug.runtime.quiet import quiet

logger = logging.getLogger("glowplug")

TIMEOUT_VARIABLE = "GLOWPLUG_BUILD_TIMEOUT"
"""Environment variable: the time limit of a job, in seconds."""
_TIMEOUT_S = 600.0
_DEATH_S = 10.0
"""How long to wait for a killed process to end."""
_WORKER = "glowplug.background.worker"
WORK, SWITCHES = "work", "switches"
"""Files that a new process reads: the pickled work, and the process-wide switches of the process that began it."""
_OUTCOME = "outcome"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a job.

    Attributes:
        reason: why the job failed; None on success.
        seconds: how long it took.
        facts: further results, as JSON values.
    """

    reason: str | None
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


class Say(Protocol):
    """Reports the outcome of a job. Only the first call counts, and the work may go on after it."""

    def __call__(self, reason: str | None = None, **facts: Any) -> None:
        """See the attributes of `Outcome`."""
        ...


class _Fork:
    """A fork with the interface of `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code; None while the fork runs."""
        if self._code is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self._code = os.waitstatus_to_exitcode(status) if pid else None
            except ChildProcessError:  # reaped by somebody else
                self._code = 0
        return self._code

    def kill(self) -> None:
        """Kill the fork."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


Process = _Fork | subprocess.Popen[bytes]


class Job:
    """Work that another process does. The process is killed when this object is collected (but not by a fork of its
    owner), or when it exceeds its time limit.

    Args:
        begin: starts the process, given the job's folder; or the reason why no process can be started.
    """

    def __init__(self, begin: Callable[[Path], Process] | str) -> None:
        for job in list(_jobs):
            job._poll()  # reap processes that have ended
        self._process: Process | None = None
        self._outcome = Outcome(begin) if isinstance(begin, str) else None
        self._begun = time.monotonic()
        self._limit = _time_limit()
        if isinstance(begin, str):
            return
        try:
            self._scratch = Scratch("job")
            self._process = begin(self._scratch.path)
        except Exception as exc:  # too many processes, or the work can't be pickled
            self._outcome = Outcome(f"no other process can be begun: {why(exc)}")
            return
        finalize(self, functools.partial(_end, self._process))
        _jobs.add(self)

    @classmethod
    def fork(cls, work: Callable[[Say], None], *, nice: int = 10) -> Job:
        """Start work in a fork of this process. The fork's output is discarded.

        The work must not use a GPU or run a parallel OpenMP region, as this process's threads do not exist in the fork.

        Args:
            work: receives the function that reports the outcome. If it raises before reporting, that is the outcome.
            nice: niceness that the fork adds to its own, see `os.nice`.
        """
        return cls(functools.partial(_fork, work, nice))

    @classmethod
    def spawn(cls, work: Callable[..., None], *arguments: Any) -> Job:
        """Start `work(say, *arguments)`, pickled, in a new process that takes over the switches of this one."""

        def begin(folder: Path) -> Process:
            (folder / WORK).write_bytes(pickle.dumps((work, arguments)))
            (folder / SWITCHES).write_bytes(read_switches())
            null = subprocess.DEVNULL
            command = [sys.executable, "-m", _WORKER, str(folder)]
            return subprocess.Popen(command, stdin=null, stdout=null, stderr=null)

        return cls(begin)

    @property
    def ours(self) -> bool:
        """Whether this process started the job. A fork of that process must not wait for the job: it takes the results
        from the store, or builds its own."""
        return self._process is None or self._scratch.ours

    def ended(self, deadline: float | None = None) -> bool:
        """Whether the process has ended, as far as this one can tell. Waits until `deadline` (`time.monotonic()`)."""
        return self._wait(self._poll, deadline)

    def outcome(self, deadline: float | None = None) -> Outcome | None:
        """The reported outcome; None if there is none yet. Waits until `deadline` (`time.monotonic()`)."""
        if self._outcome is None and self._wait(lambda: self._path.exists() or self._poll(), deadline):
            self._outcome = self._outcome or self._read("the other process died")
        return self._outcome

    def stop(self) -> None:
        """Kill the process."""
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
    with quiet():
        parent = os.getpid()
        pid = fork_plainly()
    if pid == 0:  # the child, which never returns
        code = 1
        try:
            global _parent
            _parent = parent
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 1)
                os.dup2(null.fileno(), 2)
            torch.set_num_threads(1)
            os.nice(nice)
            run_job(work, folder)
            code = 0
        finally:
            os._exit(code)
    return _Fork(pid)


def run_job(work: Callable[[Say], None], folder: Path) -> None:
    """Run the work of a job in this process and report its outcome; for `work` see `Job.fork`.

    This process creates its scratch folders in the job's folder, so they are deleted with it even after a kill.
    """
    Scratch.home = str(folder)
    start = time.perf_counter()

    def say(reason: str | None = None, **facts: Any) -> None:
        path = folder / _OUTCOME
        if not path.exists():  # the rename makes it atomic
            outcome = Outcome(reason, round(time.perf_counter() - start, 3), facts)
            path.with_suffix(".part").write_text(json.dumps(asdict(outcome)))
            path.with_suffix(".part").rename(path)

    try:
        work(say)
        say()
    except Exception as exc:
        say(why(exc))
    finally:
        if orphaned():  # the owner can't delete it any more
            shutil.rmtree(folder, ignore_errors=True)


def in_fork() -> bool:
    """Whether this process is a job that is a fork, or one of its own forks."""
    return _parent != 0


def orphaned() -> bool:
    """Whether this process is a job whose owner has ended, so that nobody waits for its results."""
    return in_fork() and os.getppid() != _parent


def _end(process: Process) -> None:
    if process.poll() is None:
        process.kill()
        deadline = time.monotonic() + _DEATH_S
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)


def _time_limit() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, "").strip()
    if text and not text.isdecimal():
        logger.warning("glowplug: %s=%r is ignored; set it to a whole number of seconds", TIMEOUT_VARIABLE, text)
    return float(text) if text.isdecimal() else _TIMEOUT_S
