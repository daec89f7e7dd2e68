"""With a torch that is too old: one line and exit code 2 on the command line, the error itself for an import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

OLD = "import torch, sys, runpy; torch.__version__ = '2.10.1+cpu'; "


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", OLD + code], capture_output=True, text=True)


@pytest.mark.parametrize("command", ["glowplug", "-m"])
def test_the_command_says_so_in_one_line(command: str) -> None:
    done = run(f"sys.argv = [{command!r}, 'demo']; import glowplug")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "needs torch 2.11" in done.stderr and "2.10.1" in done.stderr and "pip install" in done.stderr


def test_an_import_raises() -> None:
    done = run("import glowplug")
    assert done.returncode == 1
    assert "UnsupportedTorchError: glowplug needs torch 2.11" in done.stderr


def test_the_installed_command(tmp_path: Path) -> None:
    """The real console script, with an old torch put in front of the real one."""
    (tmp_path / "torch.py").write_text("__version__ = '2.5.0'\n")
    command = Path(sys.executable).with_name("glowplug")
    if not command.exists():
        pytest.skip("glowplug is not installed as a command here")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
