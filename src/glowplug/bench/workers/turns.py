"""Steady states measured in turns: all strategies' processes stay alive and run a few steps each, round after round.

A machine's speed varies from minute to minute; in turns, every strategy is measured in the same minutes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from glowplug.bench.workers.isolate import Isolated

FOLDER = "GLOWPLUG_BENCH_TURNS"
"""Environment variable with the folder through which a process and the runner signal each other by files."""
_PAUSE_S = 0.02


def my_turns() -> Iterator[None] | None:
    """In a measuring process: yields once for each turn that the runner grants; None if there are no turns."""
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
    """The runner's side of one process, whose `FOLDER` must be the process's own folder."""

    def __init__(self, process: Isolated) -> None:
        self.process = process
        self.turns = 0

    def wait_until_ready(self) -> None:
        """Wait until the process asks for its first turn, has ended, or times out."""
        if not self._wait("ready", self.process.timeout_s):
            self.process.expire()

    def turn(self, timeout_s: float) -> None:
        """Give the process one turn, and wait for the end of it."""
        if (self.process.folder / "ready").exists() and not self.process.ended:
            (self.process.folder / f"go-{self.turns}").touch()
            self.turns += 1
            if not self._wait(f"done-{self.turns - 1}", timeout_s):
                self.process.expire()

    def stop(self) -> None:
        """Tell the process that there are no more turns."""
        (self.process.folder / "stop").touch()

    def _wait(self, name: str, timeout_s: float) -> bool:
        """Wait until the process has written a file or ended; False on timeout."""
        deadline = time.monotonic() + timeout_s
        while not (self.process.folder / name).exists() and not self.process.ended:
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE_S)
        return True


def take_turns(turners: Sequence[Turner], rounds: int, timeout_s: float) -> None:
    """Let the processes take turns, in reverse order every other round."""
    for number in range(rounds):
        for turner in turners if number % 2 == 0 else reversed(turners):
            turner.turn(timeout_s)
    for turner in turners:
        turner.stop()
