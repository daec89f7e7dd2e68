"""Forks of a process that has a compiled model: they answer, whatever the parent was in the middle of, and leave alone
what is the parent's. Each case is a process of its own, with several threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glowplug.checkpoints import find_checkpoint

TESTS = Path(__file__).parents[1]
MODEL = find_checkpoint("tiny-gpt-oss")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

without_gpu = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="a process that has a GPU builds nothing in forks, nor does a fork of it"
)

PRELUDE = """
import gc, os, sys, threading, time, traceback
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, logging

import families
import glowplug
from storing import StoringGraphs

logging.set_verbosity_error()
logging.disable_progress_bar()
MODEL = sys.argv[1]
ids = torch.arange(1, 9)[None]


def load():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval().requires_grad_(False)


def tokens(model):
    return model.generate(ids, max_new_tokens=8, do_sample=False).tolist()


def in_fork(work, seconds=90.0, leave=os._exit):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        leave(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert status == 0, f"the fork failed: {status}"
            return
        time.sleep(0.05)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("the fork hangs")


def check(condition):
    assert condition
"""


def run(script: str, threads: int = 2, **environment: str) -> None:
    """Run a script in a process of its own."""
    found = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    given = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "GLOWPLUG_CACHE": "off",
        "PYTHONPATH": os.pathsep.join(filter(None, found)),
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script, str(MODEL)], env=given, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("way", "threads"), [("from_pretrained", 2), ("compile", 4)])
def test_a_fork_generates(way: str, threads: int) -> None:
    run(
        f"""
expected = load()
if {way!r} == "compile":
    model = glowplug.compile(load(), compiler="eager")
    tokens(model)
else:
    model = glowplug.from_pretrained(MODEL, compiler="eager", dtype=torch.float32)
torch.set_num_threads({threads})

def work():
    check(torch.get_num_threads() == {threads})
    torch.randn(1000, 1000).exp()
    check(tokens(model) == tokens(expected))
    check(glowplug.report(model).programs == 1 and not glowplug.report(model).fallbacks)

for _ in range(2):
    in_fork(work)
in_fork(lambda: in_fork(work))
check(tokens(model) == tokens(expected))
""",
        threads,
    )


@without_gpu
def test_a_fork_beside_a_build_of_another_thread_builds_by_itself() -> None:
    """The other thread holds every lock that a build takes, and the garbage collector stands still."""
    run("""
begun, go_on = threading.Event(), threading.Event()

class Blocked:
    name = "blocked"
    home = os.getpid()

    def compile(self, piece, inputs):
        if os.getpid() == self.home:
            begun.set()
            check(go_on.wait(300))
        return piece.forward

expected = load()
model = glowplug.compile(load(), compiler=Blocked())
plain = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(6))).eval().requires_grad_(False)
other = glowplug.compile(plain, compiler="eager")
x = torch.randn(3, 8)
thread = threading.Thread(target=tokens, args=(model,))
thread.start()
check(begun.wait(120))

def work():
    check(gc.isenabled())
    check(tokens(model) == tokens(expected))
    report = glowplug.report(model)
    check(report.programs == 1 and not report.fallbacks)
    torch.testing.assert_close(other(x), type(plain).forward(plain, x))
    check(glowplug.report(other).strategy == "stamped")

in_fork(work)
go_on.set()
thread.join(120)
check(not thread.is_alive())
check(tokens(model) == tokens(expected) and gc.isenabled())
""")


def test_a_fork_beside_a_compilation_of_dynamo() -> None:
    run("""
begun, go_on = threading.Event(), threading.Event()

def backend(gm, inputs):
    begun.set()
    check(go_on.wait(300))
    return gm.forward

thread = threading.Thread(target=torch.compile(lambda x: x + 1, backend=backend), args=(torch.ones(3),))
thread.start()
check(begun.wait(120))
expected, model = load(), glowplug.compile(load(), compiler="eager")

def work():
    check(tokens(model) == tokens(expected))
    check(glowplug.report(model).programs == 1)

in_fork(work)
go_on.set()
thread.join(120)
check(not thread.is_alive())
""")


SLOW = """
GO = Path(os.environ["TMPDIR"], "go")

class Slow(StoringGraphs):
    def compile(self, piece, inputs):
        while os.getpid() != self.home and not GO.exists():
            time.sleep(0.05)
        return super().compile(piece, inputs)

def pending(store):
    model, same = families.build("gpt_oss", layers=20), families.build("gpt_oss", layers=20)
    same.load_state_dict(model.state_dict())
    glowplug.compile(model, compiler=Slow(), cache_dir=store)
    with torch.no_grad():
        model(ids)
    check(glowplug.report(model).pending_pieces == 2)
    return model, same
"""


@pytest.mark.parametrize("stored", [False, True])
def test_a_fork_leaves_what_is_compiled_beside_serving_to_its_parent(stored: bool, tmp_path: Path) -> None:
    """It ends as a process does, with all that is called then; nor does it wait for what it can't have."""
    run(
        SLOW
        + f"""
model, same = pending({str(tmp_path / "store") if stored else "off"!r})

def work():
    check(tokens(model) == tokens(same))
    GO.touch()
    glowplug.settle(model, 60.0)
    check(tokens(model) == tokens(same))
    report = glowplug.report(model)
    check((report.pending_pieces, report.fallbacks) == (0, []))

def leave(code):
    sys.exit(code)

in_fork(work, leave=leave)
check(glowplug.report(model).pending_pieces == 2 or {stored})
glowplug.settle(model, 60.0)
report = glowplug.report(model)
check((report.pending_pieces, report.compiled_pieces, report.fallbacks) == (0, report.distinct_pieces, []))
check(tokens(model) == tokens(same))
""",
        TMPDIR=str(tmp_path),
    )
    assert list(tmp_path.glob("glowplug-*")) == []


def test_a_fork_leaves_the_builds_and_the_folders_of_its_parent_alone(tmp_path: Path) -> None:
    run(
        """
GO = Path(os.environ["TMPDIR"], "go")

class Slow(StoringGraphs):
    def compile(self, piece, inputs):
        while os.getppid() == self.home and not GO.exists():
            time.sleep(0.05)
        return super().compile(piece, inputs)

model, same = families.build("gpt_oss", layers=8), families.build("gpt_oss", layers=8)
same.load_state_dict(model.state_dict())
glowplug.compile(model, compiler=Slow(), cache_dir="off", background=True)
with torch.no_grad():
    model(ids), model(ids)

in_fork(lambda: check(tokens(model) == tokens(same)), leave=sys.exit)
GO.touch()
glowplug.settle(model)
check(tokens(model) == tokens(same))
report = glowplug.report(model)
check((report.strategy, report.elsewhere.reason, report.fallbacks) == ("stamped", None, []))
in_fork(lambda: check(tokens(model) == tokens(same)), leave=sys.exit)
check(tokens(model) == tokens(same))
""",
        TMPDIR=str(tmp_path),
    )
    assert list(tmp_path.glob("glowplug-*")) == []


HANGS = """
class Hangs(StoringGraphs):
    def compile(self, piece, inputs):
        if os.getpid() != self.home:
            time.sleep(1000)
        return super().compile(piece, inputs)
"""


@without_gpu
@pytest.mark.parametrize("store", ["off", "on"])
def test_a_build_that_does_not_answer_is_given_up(store: str, tmp_path: Path) -> None:
    run(
        HANGS
        + f"""
model = glowplug.from_pretrained(
    MODEL, compiler=Hangs(), ends="compiled", cache_dir={"off" if store == "off" else str(tmp_path / "store")!r}
)
report = glowplug.report(model)
check("did not answer within 5 s" in report.elsewhere.reason)
check((report.programs, report.start, report.fallbacks) == (1, "cold", []))
check(tokens(model) == tokens(load()))
""",
        GLOWPLUG_BUILD_TIMEOUT="5",
        TMPDIR=str(tmp_path),
    )
    assert list(tmp_path.glob("glowplug-*")) == []


@without_gpu
def test_a_background_build_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    run(
        HANGS
        + """
model, same = load(), load()
glowplug.compile(model, compiler=Hangs(), cache_dir="off", background=True)
with torch.no_grad():
    for _ in range(3):
        torch.testing.assert_close(model(ids).logits, same(ids).logits)
        glowplug.settle(model, 60.0)
reasons = [fallback.reason for fallback in glowplug.report(model).fallbacks]
check(len(reasons) == 1 and "did not answer within 5 s" in reasons[0])
""",
        GLOWPLUG_BUILD_TIMEOUT="5",
    )
