"""Runs a module in a fresh process with fresh compiler caches, so that nothing compiled before can help it.

The module takes one JSON argument and prints one JSON object as its last line; `run_worker` does both for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from glowplug.bench.models import one_line

_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "GLOWPLUG_CACHE")


class IsolatedError(Exception):
    """The process timed out or died without an answer; the message says which.

    Attributes:
        answer: the last answer that it printed on its way, or None.
    """

    def __init__(self, message: str, answer: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.answer = answer


class Isolated:
    """A process that runs `python -m module argument` with empty compiler caches, which are deleted with it.

    It does not outlive this process, even if that is killed: see `run_worker`. `extra` adds environment variables; `{}`
    in a value stands for the process's own folder.
    """

    def __init__(self, module: str, argument: str, *, timeout_s: float, extra: dict[str, str] | None = None) -> None:
        self.timeout_s = timeout_s
        self._expired = False
        self._temporary = tempfile.TemporaryDirectory(prefix="glowplug-bench-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        environment = dict(os.environ)
        for name in _CACHES:
            environment[name] = str(self.folder / name.lower())
        # Inductor keeps precompiled headers in the folder for temporary files, whatever its cache folder is.
        environment["TMPDIR"] = str(self.folder / "tmp")
        Path(environment["TMPDIR"]).mkdir()
        environment["HF_HUB_OFFLINE"] = "1"
        environment["TOKENIZERS_PARALLELISM"] = "false"
        environment |= {name: value.format(self.folder) for name, value in (extra or {}).items()}
        # Files, not pipes: a compile worker that outlives the process would hold a pipe open.
        with (self.folder / "stdout").open("w") as output, (self.folder / "stderr").open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, argument],
                stdin=subprocess.PIPE,  # nothing is written; it closes when this process ends
                stdout=output,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def expire(self) -> None:
        """Make `answer` report a timeout unless the process has ended by then."""
        self._expired = True

    def answer(self) -> dict[str, Any]:
        """Wait until the process ends, and return the JSON object on the last line of its output.

        Raises:
            IsolatedError: it timed out, died, or printed no such line.
        """
        try:
            code = self._process.wait(timeout=0 if self._expired else self.timeout_s)
        except subprocess.TimeoutExpired:
            message = f"timeout: not finished after {self.timeout_s:g} s"
            raise IsolatedError(message, _last_answer(self.folder)) from None
        finally:
            _stop(self._process)
        return _answer(self.folder, code)

    def close(self) -> None:
        """Stop the process and everything it started, and delete its folder."""
        _stop(self._process)
        self._temporary.cleanup()


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
    """Wait until the process that started this one ends, however it does: that closes the pipe on stdin. Then kill this
    process, and all that it started."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and the compile workers that it started, if they still run."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


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
