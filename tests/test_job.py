"""Jobs: what they say, what ends them, and what is left of them when their owner's process ends."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from glowplug.background.job import Job, Say

PARENT = """
import sys, time
from glowplug.background.job import Job

def work(say):
    say(begun=True)
    time.sleep(1.0)

job = Job.fork(work)
assert job.outcome(time.monotonic() + 60.0).facts == {"begun": True}
print(job._scratch.path, flush=True)
if sys.argv[1] == "wait":
    time.sleep(60.0)
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def soon() -> float:
    return time.monotonic() + 60.0


def test_a_job_says_what_became_of_it_once() -> None:
    def work(say: Say) -> None:
        say("no luck", tries=3)
        say()
        raise ValueError("too late to be said")

    job = Job.fork(work)
    outcome = job.outcome(soon())
    assert outcome is not None
    assert (outcome.reason, outcome.facts) == ("no luck", {"tries": 3})
    assert job.ended(soon()) and job.outcome() is outcome


def test_a_job_without_a_word_did_its_work_and_one_that_raises_did_not() -> None:
    def work(say: Say) -> None:
        raise ValueError("that went wrong")

    for job, reason in ((Job.fork(lambda _: None), None), (Job.fork(work), "that went wrong")):
        outcome = job.outcome(soon())
        assert outcome is not None and (outcome.reason is None) == (reason is None)
        assert reason is None or reason in str(outcome.reason)


def test_a_job_that_dies_or_takes_too_long_came_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    died = Job.fork(lambda _: os._exit(3)).outcome(soon())
    assert died is not None and died.reason == "the other process died"
    monkeypatch.setenv("GLOWPLUG_BUILD_TIMEOUT", "1")
    job = Job.fork(lambda _: time.sleep(600.0))
    assert job.outcome() is None and not job.ended()
    late = job.outcome(soon())
    assert late is not None and "did not answer within 1 s" in str(late.reason)
    assert job.ended()


def test_a_machine_without_room_for_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr("glowplug.background.job.fork_plainly", refuse)
    job = Job.fork(lambda _: None)
    outcome = job.outcome()
    assert job.ended() and outcome is not None and "no other process can be begun" in str(outcome.reason)


def test_a_job_goes_with_its_owner_and_not_with_a_fork_of_it() -> None:
    owned = [Job.fork(lambda _: time.sleep(600.0))]
    process: Any = owned[0]._process

    def look(say: Say) -> None:
        say(ours=owned[0].ours, ended=owned[0].ended(soon()))
        owned[0].stop()

    told = Job.fork(look)
    outcome = told.outcome(soon())
    assert outcome is not None and outcome.facts == {"ours": False, "ended": True}
    assert told.ended(soon()) and not owned[0].ended()
    folder = owned.pop()._scratch.path
    gc.collect()
    assert process.poll() is not None and not folder.exists()


def given(say: Say, number: int) -> None:
    """The work of a new process."""
    say(number=number, precision=torch.get_float32_matmul_precision())


def test_a_new_process_has_the_switches_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        job = Job.spawn(given, 7)
    finally:
        torch.set_float32_matmul_precision(before)
    outcome = job.outcome(time.monotonic() + 120.0)
    assert outcome is not None
    assert (outcome.reason, outcome.facts) == (None, {"number": 7, "precision": "high"})
    unsaid = Job.spawn(lambda say: None).outcome()
    assert unsaid is not None and "no other process can be begun" in str(unsaid.reason)


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
