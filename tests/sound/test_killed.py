"""A command that is ended from outside leaves no process behind, and, unless it is killed outright, no folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PATIENCE_S = 120.0
WORKER = """
import subprocess, time
from glowplug.bench.workers.isolate import run_worker

def work(_):
    subprocess.Popen(["sleep", "600"])
    time.sleep(600)

def main():
    run_worker(work, lambda *_: {})

if __name__ == "__main__":
    main()
"""
STARTER = """
from glowplug.bench.workers.isolate import Isolated
Isolated("worker", "{{}}", timeout_s=600, forked={}).answer()
"""


def processes() -> list[tuple[int, int, int]]:
    """The process id, the parent's and the group's of every process that has not ended."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,pgid=,stat="], capture_output=True, text=True, check=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [(int(row[0]), int(row[1]), int(row[2])) for row in rows if not row[3].startswith("Z")]


def group(leader: int) -> int:
    """How many processes of a group have not ended."""
    return sum(pgid == leader for _, _, pgid in processes())


def until(condition: Callable[[], int]) -> int:
    """Wait until a value is not 0, and return it."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return value


def begin(folder: Path, *arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start Python, wait for a process that it starts as the leader of a group, and return both."""
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}
    null = subprocess.DEVNULL
    command = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=null, stderr=null)

    def worker() -> int:
        """The leader of a group that descends from the command."""
        assert command.poll() is None, "it ended by itself"
        listed = processes()
        started, before = {command.pid}, set[int]()
        while started != before:
            before = started
            started = started | {pid for pid, parent, _ in listed if parent in started}
        return next((pid for pid, _, leader in listed if pid in started and leader == pid), 0)

    return command, until(worker)


@pytest.mark.parametrize(
    ("number", "arguments"),
    [
        (signal.SIGINT, ("demo",)),
        (signal.SIGTERM, ("sweep", "--families", "mixtral")),
        (signal.SIGHUP, ("bench", "mixtral-8x22b", "--depth", "1")),
    ],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
def test_a_command_that_is_stopped_cleans_up(
    number: signal.Signals, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("the tests were started with this signal ignored, and so would be the command")
    command, worker = begin(tmp_path, "-m", "glowplug", *arguments)
    command.send_signal(number)
    assert command.wait(PATIENCE_S) == 128 + number
    assert group(worker) == 0
    assert not list(tmp_path.glob("glowplug-*"))


@pytest.mark.parametrize("forked", [False, True])
def test_a_killed_command_takes_its_workers_and_theirs_along(forked: bool, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    command, worker = begin(tmp_path, "-c", STARTER.format(forked))
    until(lambda: group(worker) == 2)
    command.kill()
    command.wait(PATIENCE_S)
    until(lambda: group(worker) == 0)
