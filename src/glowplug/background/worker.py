"""A job in a process of its own: `python -m glowplug.background.worker FOLDER`."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from glowplug.background.job import SWITCHES, WORK, Say, do
from glowplug.compilers.environment import set_switches


def main(folder: Path) -> None:
    """Do the work that the job's folder holds."""

    def work(say: Say) -> None:
        set_switches((folder / SWITCHES).read_bytes())
        function, arguments = pickle.loads((folder / WORK).read_bytes())
        function(say, *arguments)

    do(work, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
