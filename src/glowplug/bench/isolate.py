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

_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class IsolatedError(Exception):
    """The process ended without an answer: it was stopped after its time, or died; the message says which."""


def run_isolated(module: str, argument: str, *, timeout_s: float) -> dict[str, Any]:
    """Run `python -m module argument` with empty compiler caches, which are deleted afterwards.

    Args:
        module: name of the module.
        argument: its argument, JSON.
        timeout_s: seconds after which the process and all that it started are stopped.

    Returns:
        The JSON object on the last line of its output.

    Raises:
        IsolatedError: it ran out of time, died, or printed no such line.
    """
    with tempfile.TemporaryDirectory(prefix="glowplug-bench-", ignore_cleanup_errors=True) as folder:
        environment = dict(os.environ)
        for name in _CACHES:
            environment[name] = str(Path(folder) / name.lower())
        # Inductor keeps precompiled headers in the folder for temporary files, whatever its cache folder is.
        environment["TMPDIR"] = str(Path(folder) / "tmp")
        Path(environment["TMPDIR"]).mkdir()
        environment["HF_HUB_OFFLINE"] = "1"
        environment["TOKENIZERS_PARALLELISM"] = "false"
        # Files, not pipes: a compile worker that outlives the process would hold a pipe open.
        with (Path(folder) / "stdout").open("w+") as output, (Path(folder) / "stderr").open("w+") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", module, argument],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                raise IsolatedError(f"timeout: not finished after {timeout_s:g} s") from None
            finally:
                _stop(process)
        return _answer(Path(folder), code)


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
