"""Runs a job in a new process: `python -m glowplug.background.worker FOLDER`."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from glowplug.background.job import SWITCHES, WORK, Say, run_job
from glowplug.compilers.environment import set_switches


def main(folder: Path) -> None:
    """Run the job in a folder."""

    def work(say: Say) -> None:
        set_switches((folder / SWITCHES).read_bytes())
        function, arguments = pickle.loads((folder / WORK).read_bytes())
        function(say, *arguments)

    run_job(work, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
