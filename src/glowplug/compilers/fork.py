"""Forks of this process that compile."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Child:
    """A forked process."""

    pid: int
    ended: bool = False

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
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self.ended = True

    def poll(self) -> bool:
        """Whether it has ended."""
        if not self.ended:
            try:
                self.ended = os.waitpid(self.pid, os.WNOHANG)[0] == self.pid
            except ChildProcessError:  # somebody else has waited for it
                self.ended = True
        return self.ended


def fork(work: Callable[[], None]) -> Child | None:
    """Run `work` in a fork of this process, silently; its result is what it leaves in files.

    The child must not touch a GPU, nor run a parallel region of OpenMP: this process's threads do not exist there.

    Returns:
        The child; None when the machine allows no further process.
    """
    with warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads. The child touches none of their locks, and is waited for in time.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            pid = os.fork()
        except OSError:
            return None
    if pid == 0:  # the child; never returns
        code = 1
        try:
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
    return Child(pid)
