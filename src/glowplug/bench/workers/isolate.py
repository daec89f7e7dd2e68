"""Runs a module in a fresh process with fresh compiler caches, so that nothing compiled before can help it.

The module takes one JSON argument and prints one JSON object as its last line; `run_worker` does both for it. The
process is a new Python or, where many short runs would import the same, a fork of one that has only imported.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from transformers.utils import logging

from glowplug.bench.models import one_line

_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "GLOWPLUG_CACHE")
_QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class IsolatedError(Exception):
    """The process timed out or died without an answer; the message says which.

    Attributes:
        answer: the last answer that it printed on its way, or None.
    """

    def __init__(self, message: str, answer: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.answer = answer


class Isolated:
    """A process that runs a module with empty compiler caches, which are deleted with it.

    It does not outlive this process, even if that is killed: see `run_worker`.

    Args:
        module: its name. `python -m module argument` runs it; if it is forked, its `main` is called.
        argument: one JSON value.
        timeout_s: how long `answer` waits, in seconds.
        extra: further environment variables; `{}` in a value stands for the process's own folder.
        forked: start it as a fork of a process that has imported the module, and done nothing else.
    """

    def __init__(
        self,
        module: str,
        argument: str,
        *,
        timeout_s: float,
        extra: dict[str, str] | None = None,
        forked: bool = False,
    ) -> None:
        self.timeout_s = timeout_s
        self._expired = False
        self._temporary = tempfile.TemporaryDirectory(prefix="glowplug-bench-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        environment = {name: str(self.folder / name.lower()) for name in _CACHES}
        # Inductor keeps precompiled headers in the folder for temporary files, whatever its cache folder is.
        environment["TMPDIR"] = str(self.folder / "tmp")
        Path(environment["TMPDIR"]).mkdir()
        environment |= _QUIET
        environment |= {name: value.format(self.folder) for name, value in (extra or {}).items()}
        start = _Forked if forked else _Started
        self._process: _Process = start(module, argument, self.folder, environment)

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.wait(0) is not None

    def expire(self) -> None:
        """Make `answer` report a timeout unless the process has ended by then."""
        self._expired = True

    def answer(self) -> dict[str, Any]:
        """Wait until the process ends, and return the JSON object on the last line of its output.

        Raises:
            IsolatedError: it timed out, died, or printed no such line.
        """
        try:
            code = self._process.wait(0 if self._expired else self.timeout_s)
        finally:
            self._process.stop()
        if code is None:
            raise IsolatedError(f"timeout: not finished after {self.timeout_s:g} s", _last_answer(self.folder))
        return _answer(self.folder, code)

    def close(self) -> None:
        """Stop the process and everything it started, and delete its folder."""
        self._process.stop()
        self._temporary.cleanup()


class _Process(Protocol):
    """A process that leads a session of its own and writes to the files `stdout` and `stderr` of a folder.

    Files, not pipes: a compile worker that outlives the process would hold a pipe open.
    """

    def __init__(self, module: str, argument: str, folder: Path, environment: dict[str, str]) -> None: ...

    def wait(self, timeout_s: float) -> int | None:
        """Wait until it ends, and return its exit code, or minus the signal that killed it; None if it still runs."""

    def stop(self) -> None:
        """Kill it and the compile workers that it started, if they still run."""


class _Started:
    """A new Python."""

    def __init__(self, module: str, argument: str, folder: Path, environment: dict[str, str]) -> None:
        with (folder / "stdout").open("w") as output, (folder / "stderr").open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, argument],
                stdin=subprocess.PIPE,  # nothing is written; it closes when this process ends
                stdout=output,
                stderr=errors,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def wait(self, timeout_s: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    def stop(self) -> None:
        _kill_group(self._process.pid)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


class _Forked:
    """A fork of the process that imports for all of them, Python's fork server."""

    def __init__(self, module: str, argument: str, folder: Path, environment: dict[str, str]) -> None:
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([module])
        os.environ.update(_QUIET)  # the server takes this process's, and libraries read it when they are imported
        self._process = context.Process(target=_run_forked, args=(module, argument, folder, environment))
        self._process.start()

    def wait(self, timeout_s: float) -> int | None:
        self._process.join(timeout_s)
        return self._process.exitcode

    def stop(self) -> None:
        if self._process.pid is not None:
            _kill_group(self._process.pid)
        self._process.kill()
        self._process.join()


def _run_forked(module: str, argument: str, folder: Path, environment: dict[str, str]) -> None:
    os.setsid()
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, folder / "stdout", os.O_WRONLY),
        (2, folder / "stderr", os.O_WRONLY),
    ):
        opened = os.open(name, flags)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.update(environment)
    tempfile.tempdir = None  # TMPDIR is another one now
    multiprocessing.set_start_method(None, force=True)  # not the fork server, which Python hands down
    sys.argv = [module, argument]
    importlib.import_module(module).main()


def run_isolated(module: str, argument: str, *, timeout_s: float) -> dict[str, Any]:
    """Run a module in an `Isolated` process and return its answer; raises as `Isolated.answer` does."""
    process = Isolated(module, argument, timeout_s=timeout_s)
    try:
        return process.answer()
    finally:
        process.close()


def run_worker(
    work: Callable[[dict[str, Any]], dict[str, Any]],
    failed: Callable[[dict[str, Any], str], dict[str, Any]],
    limit: int = 300,
) -> None:
    """In the process: call `work` with the JSON argument and print its answer, or that of `failed` with the error."""
    if os.getsid(0) == os.getpid():  # `Isolated` started it, not a person by hand
        threading.Thread(target=_end_with_starter, daemon=True).start()
    argument = json.loads(sys.argv[1])
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        answer = work(argument)
    except Exception as exc:  # a failure is a result, too
        answer = failed(argument, f"{type(exc).__name__}: {one_line(exc, limit)}")
    print_answer(answer)


def print_answer(answer: dict[str, Any]) -> None:
    """In the process: print an answer, the last one or one on the way."""
    print("\n" + json.dumps(answer), flush=True)


def _end_with_starter() -> None:
    """Wait until the process that started this one ends, however it does. Then kill this process, and all that it
    started."""
    starter = multiprocessing.parent_process()
    if starter is None:
        os.read(0, 1)  # closes with it
    else:
        multiprocessing.connection.wait([starter.sentinel])
    os.killpg(0, signal.SIGKILL)


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _answer(folder: Path, code: int) -> dict[str, Any]:
    answer = _last_answer(folder)
    if code == 0 and answer is not None:
        return answer
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    errors = (folder / "stderr").read_text(errors="replace").strip().splitlines()
    raise IsolatedError(f"the process {ended}" + (f": {errors[-1]}" if errors else ""), answer)


def _last_answer(folder: Path) -> dict[str, Any] | None:
    """The JSON object on the last line of a process's output, or None."""
    lines = (folder / "stdout").read_text(errors="replace").strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None
