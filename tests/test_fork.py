"""Forks beside serving: what is left of them when their parent ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PARENT = """
import os, sys, time
from pathlib import Path
from glowplug.compilers.fork import Beside, leave

def work(folder: Path) -> None:
    leave(folder / "begun", b"")
    time.sleep(1.0)
    leave(folder / "done", b"")

beside = Beside(work)
beside.wait_for("begun", time.monotonic() + 60.0)
print(beside.folder, flush=True)
if sys.argv[1] == "wait":
    time.sleep(60.0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("ending", ["end", "terminate", "kill"])
def test_nothing_is_left_of_a_fork_whose_parent_has_ended(ending: str, tmp_path: Path) -> None:
    what = "end" if ending == "end" else "wait"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, what], env=environment, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        folder = Path(parent.stdout.readline().strip())
        assert folder.parent == tmp_path
        if ending != "end":
            assert folder.exists()
            parent.send_signal(signal.SIGKILL if ending == "kill" else signal.SIGTERM)
    deadline = time.monotonic() + 30.0
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.glob("glowplug-*")) == []
