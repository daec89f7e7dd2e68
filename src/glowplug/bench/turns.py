"""Steady states measured in turns: every strategy's process stays alive, and they run a few steps each, round after
round. Machines slow down and speed up by the minute; in turns, each strategy meets the same minutes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from glowplug.bench.isolate import Isolated

FOLDER = "GLOWPLUG_BENCH_TURNS"
"""Environment variable: the folder in which a process and the runner leave each other files."""
_PAUSE_S = 0.02


def my_turns() -> Iterator[None] | None:
    """In a measuring process: yields once for each turn that the runner gives it; None when it gives none."""
    folder = os.environ.get(FOLDER)
    return _turns(Path(folder)) if folder else None


def _turns(folder: Path) -> Iterator[None]:
    number = 0
    (folder / "ready").touch()
    while True:
        while not (folder / f"go-{number}").exists():
            if (folder / "stop").exists():
                return
            time.sleep(_PAUSE_S)
        yield
        (folder / f"done-{number}").touch()
        number += 1


class Turner:
    """The runner's side of one process.

    Args:
        process: the process; its folder is that of the variable.
    """

    def __init__(self, process: Isolated) -> None:
        self.process = process
        self.given = 0

    def wait_until_ready(self) -> None:
        """Until it asks for its first turn, has ended, or is out of time."""
        if not self._wait("ready", self.process.timeout_s):
            self.process.expire()

    def turn(self, timeout_s: float) -> None:
        """Give it one turn, and wait for its end."""
        if (self.process.folder / "ready").exists() and not self.process.ended:
            (self.process.folder / f"go-{self.given}").touch()
            self.given += 1
            if not self._wait(f"done-{self.given - 1}", timeout_s):
                self.process.expire()

    def stop(self) -> None:
        """No more turns."""
        (self.process.folder / "stop").touch()

    def _wait(self, name: str, timeout_s: float) -> bool:
        """Wait for a file of the process; False when the time is over."""
        deadline = time.monotonic() + timeout_s
        while not (self.process.folder / name).exists() and not self.process.ended:
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE_S)
        return True


def take_turns(turners: Sequence[Turner], rounds: int, timeout_s: float) -> None:
    """Let processes take turns; every other round in the other order."""
    for number in range(rounds):
        for turner in turners if number % 2 == 0 else reversed(turners):
            turner.turn(timeout_s)
    for turner in turners:
        turner.stop()
