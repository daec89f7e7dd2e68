"""Helpers: forks that get ready while this process does something else, and then do one piece of its work."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

from glowplug.background.job import Job, Say
from glowplug.reasons import why
from glowplug.runtime.forks import await_threads

logger = logging.getLogger("glowplug")


class Helper:
    """A fork that prepares itself and then waits for work. It ends with this object, or with this process.

    Args:
        prepare: what it does first, without this process's GPU and threads; returns what the work is given.
    """

    def __init__(self, prepare: Callable[[], Any]) -> None:
        self._process, self._writer = os.getpid(), -1
        try:
            self._task = tempfile.TemporaryFile(prefix="glowplug-task-")  # noqa: SIM115  (the fork reads it)
            self._reader, self._writer = os.pipe()
        except OSError as exc:
            self._job = Job(f"no helper can be begun: {why(exc)}")
            return
        await_threads()
        self._job = Job.fork(lambda say: self._serve(prepare, say), nice=0)
        os.close(self._reader)

    @property
    def waits(self) -> bool:
        """Whether it has had no work yet, as far as this process knows."""
        return self._writer >= 0 and os.getpid() == self._process

    def hand_over(self, work: Callable[..., None], *arguments: Any) -> Job | None:
        """Let the helper do `work(say, prepared, *arguments)`, pickled, once it is ready. None if it can't take it, has
        ended, has had work before, or is another process's."""
        if not self.waits:
            return None
        if self._job.ended():
            outcome = self._job.outcome()
            logger.debug("glowplug: a helper ended: %s", outcome.reason if outcome is not None else None)
            return None
        try:
            self._task.write(pickle.dumps((work, arguments)))
            self._task.flush()
            os.write(self._writer, b"\n")
        except Exception as exc:  # a full disk, what can't be pickled, or it has just ended
            logger.debug("glowplug: a helper can't take work: %s", why(exc))
            self.stop()
            return None
        self._close()
        return self._job

    def stop(self) -> None:
        """End the helper."""
        self._job.stop()
        self._close()

    def _close(self) -> None:
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1
            with contextlib.suppress(OSError):  # what a full disk did not take
                self._task.close()

    def _serve(self, prepare: Callable[[], Any], say: Say) -> None:
        os.close(self._writer)
        prepared = prepare()
        if not os.read(self._reader, 1):  # nobody wants it any more
            return
        self._task.seek(0)
        work, arguments = pickle.load(self._task)
        work(say, prepared, *arguments)
