"""Runs a module in a fresh process with fresh compiler caches, so that nothing compiled before can help it.
The module takes one JSON argument and prints one JSON object as its last line.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "GLOWPLUG_CACHE")


class IsolatedError(Exception):
    """The process ended without an answer: it was stopped after its time, or died; the message says which."""


class Isolated:
    """A process that runs `python -m module argument` with empty compiler caches, which are deleted with it.

    Args:
        module: name of the module.
        argument: its argument, JSON.
        timeout_s: seconds that it may take, for its error's message.
        extra: further environment variables; `{}` in a value stands for the process's own folder.
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
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def expire(self) -> None:
        """Its time is over: `answer` will say so, unless it has ended."""
        self._expired = True

    def answer(self) -> dict[str, Any]:
        """Wait for its end; returns the JSON object on the last line of its output.

        Raises:
            IsolatedError: it ran out of time, died, or printed no such line.
        """
        try:
            code = self._process.wait(timeout=0 if self._expired else self.timeout_s)
        except subprocess.TimeoutExpired:
            raise IsolatedError(f"timeout: not finished after {self.timeout_s:g} s") from None
        finally:
            _stop(self._process)
        return _answer(self.folder, code)

    def close(self) -> None:
        """Stop the process and all that it started, and delete its folder."""
        _stop(self._process)
        self._temporary.cleanup()


def run_isolated(module: str, argument: str, *, timeout_s: float) -> dict[str, Any]:
    """Run a module in a process of its own, see `Isolated`, and return its answer.

    Raises:
        IsolatedError: it ran out of time, died, or printed no JSON object.
    """
    process = Isolated(module, argument, timeout_s=timeout_s)
    try:
        return process.answer()
    finally:
        process.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and the compile workers that it started; harmless once they are gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _answer(folder: Path, code: int) -> dict[str, Any]:
    lines = (folder / "stdout").read_text(errors="replace").strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else None
    except ValueError:
        answer = None
    if code == 0 and isinstance(answer, dict):
        return answer
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    said = (folder / "stderr").read_text(errors="replace").strip().splitlines()
    raise IsolatedError(f"the process {ended}" + (f": {said[-1]}" if said else ""))
