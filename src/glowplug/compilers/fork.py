"""Forks of this process that compile, while it waits or while it already serves."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from glowplug.forks import Scratch, finalize, fork_plainly, in_forks, make_lock

_DEATH_S = 10.0
"""How long a killed process may take to end."""


@dataclass
class Child:
    """A forked process. It has ended, as far as another fork of the same process can tell.

    Attributes:
        pid: its number.
        parent: the process that it is a fork of.
        ended: whether it is known to have ended.
    """

    pid: int
    parent: int = field(default_factory=os.getpid)
    ended: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is a fork of this process, and not of one that this is a fork of."""
        return self.parent == os.getpid()

    def wait(self, deadline: float) -> None:
        """Until it has ended, or the deadline is over."""
        pause = 0.001
        while not self.poll() and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)

    def stop(self) -> None:
        """End it if it has not."""
        if not self.poll():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait(time.monotonic() + _DEATH_S)
            self.ended = True

    def poll(self) -> bool:
        """Whether it has ended."""
        if not self.ours:
            return True
        if not self.ended:
            try:
                self.ended = os.waitpid(self.pid, os.WNOHANG)[0] == self.pid
            except ChildProcessError:  # somebody else has waited for it
                self.ended = True
        return self.ended


_running: list[Child] = []
_parent = 0
_scratch: str | None = None


def reap() -> None:
    """Take note of forks that have ended: until then the system keeps an entry of each."""
    _running[:] = [child for child in _running if not child.poll()]


def orphaned() -> bool:
    """Whether this is a fork whose parent has ended."""
    return _parent != 0 and os.getppid() != _parent


def scratch(what: str) -> Scratch:
    """A folder that is deleted with what is returned, or with the process that this one is a fork of."""
    return Scratch(what, _scratch)


@in_forks
def _forget() -> None:
    """Forks of the process that this one is a fork of are none of this one's."""
    _running.clear()


def fork(work: Callable[[], None]) -> Child | None:
    """Run `work` in a fork of this process, silently; its result is what it leaves in files.

    The child must not touch a GPU, nor run a parallel region of OpenMP: this process's threads do not exist there.

    Returns:
        The child; None when the machine allows no further process.
    """
    with warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads. The child touches none of their locks, and is waited for in time.
        warnings.simplefilter("ignore", DeprecationWarning)
        reap()
        here = os.getpid()
        try:
            pid = fork_plainly()
        except OSError:
            return None
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
            work()
            code = 0
        finally:
            os._exit(code)
    child = Child(pid)
    _running.append(child)
    return child


class Beside:
    """Work of a fork beside serving, at a low priority. Its results are files in a folder, `folder`.

    Args:
        work: called in the fork with the folder; it leaves each file there whole or not at all, see `leave`.
        nice: how much the fork yields to other processes, as `os.nice` has it.
    """

    def __init__(self, work: Callable[[Path], None], nice: int = 10) -> None:
        self._scratch = scratch("beside")
        self.folder = folder = self._scratch.path
        self._lock = make_lock()

        def run() -> None:
            global _scratch
            _scratch = str(folder)  # what the fork has no time to delete goes with this folder
            os.nice(nice)
            try:
                work(folder)
            finally:
                if orphaned():  # nobody else is left to do it
                    shutil.rmtree(folder, ignore_errors=True)

        self._child = fork(run)
        self.started = self._child is not None
        if self._child is not None:
            finalize(self, self._child.stop)

    @property
    def pending(self) -> bool:
        """Whether the fork may still be at work, or its results wait to be taken, by this process."""
        return self._child is not None and self._child.ours

    @property
    def lost(self) -> bool:
        """Whether that is so in the process that began the work, and this one is a fork of it: what comes of the work
        is never known here."""
        return self._child is not None and not self._child.ours

    def wait(self, deadline: float) -> None:
        """Until the fork has ended, or the deadline (`time.monotonic()`) is over; takes nothing."""
        if self._child is not None:
            self._child.wait(deadline)

    def wait_for(self, name: str, deadline: float) -> bool:
        """Until a file is in the folder, the fork has ended, or the deadline (`time.monotonic()`) is over.

        Returns:
            Whether the file is there, or never will be.
        """
        pause = 0.001
        while not (self.folder / name).exists():
            if self._child is None or self._child.poll():
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)
        return True

    def finish(self, take: Callable[[Path], None], deadline: float | None = None) -> None:
        """Once the fork has ended, call `take` with the folder, once, and delete the folder.

        Args:
            take: takes the results.
            deadline: wait for the fork until then (`time.monotonic()`); None: don't wait.
        """
        with self._lock:
            child = self._child
            if child is None or not child.ours:
                return
            if deadline is not None:
                child.wait(deadline)
            if not child.poll():
                return
            self._child = None
            take(self.folder)
            self._scratch.cleanup()

    def give_up(self) -> None:
        """End the fork, and take nothing."""
        if self._child is not None:
            self._child.stop()
        self.finish(lambda _: None)


def leave(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.rename(path)
