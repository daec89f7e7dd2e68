"""Stores that something goes wrong with: damage, kills, full disks, stores that can't be written to, races."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from families import build, prompt
from glowplug.store import ArtifactStore, LocalStore
from glowplug.store.envelope import MAGIC, pack
from storing import Start

WORKER = Path(__file__).with_name("store_worker.py")
CORRUPTIONS = 2400
KILLS = 20


@pytest.fixture(scope="module")
def populated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a model that was started once. Not to be changed."""
    root = tmp_path_factory.mktemp("populated") / "store"
    Start(build("qwen3"), root, prompt(tokens=5))
    return root


@pytest.fixture
def eager() -> torch.Tensor:
    """The model's own answer."""
    with torch.no_grad():
        logits: torch.Tensor = build("qwen3")(prompt(tokens=5), use_cache=False).logits
    return logits


# -- damage ------------------------------------------------------------------------------------------------


def _flip(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 8, 64])):
        damaged[_place(damaged, draw)] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def _place(content: bytes | bytearray, draw: random.Random) -> int:
    """A place in an envelope, its header as likely as its payload."""
    return draw.randrange(min(len(content), 500)) if draw.random() < 0.5 else draw.randrange(len(content))


def _cut(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    return content[: draw.choice([0, 1, len(content) - 1, _place(content, draw)])]


def _splice(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    return content[: _place(content, draw)] + (other := draw.choice(others))[_place(other, draw) :]


def _swap(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    return draw.choice(others)


def _zero(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    start, length = _place(content, draw), draw.choice([1, 16, 512, 4096])
    return content[:start] + bytes(len(content[start : start + length])) + content[start + length :]


def _age(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    return content.replace(MAGIC, b"GLOWPLUG-ARTIFACT %d\n" % draw.randrange(10, 99), 1)


def _foreign(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    return draw.choice([b"", b"\x80\x05.", MAGIC]) + draw.randbytes(draw.randrange(3000))


def _repeat(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    start = _place(content, draw)
    return content[:start] + content[start : start + draw.randrange(1, 99)] + content[start:]


def _text(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """Another letter in the header, of any script, or a number too large."""
    place = draw.randrange(len(MAGIC), 400)
    return (
        content[:place]
        + draw.choice(["é", "\\ud800", "9" * 400, "[" * 2000, "1e999", "NaN"]).encode()
        + content[place:]
    )


DAMAGES: list[Callable[[bytes, list[bytes], random.Random], bytes]] = [
    _flip,
    _cut,
    _splice,
    _swap,
    _zero,
    _age,
    _foreign,
    _repeat,
    _text,
]


def test_every_corruption_is_noticed_or_harmless(populated: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    shutil.copytree(populated, root)
    entries = LocalStore(root, print).entries()
    good = {entry.path: (entry, entry.path.read_bytes()) for entry in entries}
    payloads = {entry.path: LocalStore(root, print).read(entry.kind, entry.key) for entry in entries}
    draw, contents, noticed = random.Random(0), [content for _, content in good.values()], 0
    assert len(entries) >= 3
    for number in range(CORRUPTIONS):
        entry, content = good[draw.choice(entries).path]
        damaged = DAMAGES[number % len(DAMAGES)](content, contents, draw)
        entry.path.write_bytes(damaged)
        store = ArtifactStore(root)
        payload = store.get(entry.kind, entry.key)
        if payload is None:
            noticed += 1
            assert store.problems, damaged[:600]
            assert not entry.path.exists()  # so that it is replaced
        else:
            assert payload == payloads[entry.path], damaged[:600]
        entry.path.write_bytes(content)
    assert noticed > 0.9 * CORRUPTIONS
    assert not LocalStore(root, print).check()


def test_a_model_starts_right_from_damaged_stores(populated: Path, tmp_path: Path, eager: torch.Tensor) -> None:
    """Whole envelopes with wrong payloads, too: what a checksum does not see must not hurt either."""
    draw = random.Random(1)
    contents = [entry.path.read_bytes() for entry in LocalStore(populated, print).entries()]
    for number in range(20):
        root = tmp_path / str(number)
        shutil.copytree(populated, root)
        entries = LocalStore(root, print).entries()
        kinds = ("manifest", "piece")
        for entry in draw.sample([entry for entry in entries if entry.kind == kinds[number % 2]], 1):
            damaged = DAMAGES[number % len(DAMAGES)](entry.path.read_bytes(), contents, draw)
            entry.path.write_bytes(damaged if number < 12 else pack(entry.kind, entry.key, damaged, None))
        start = Start(build("qwen3"), root, prompt(tokens=5))
        assert torch.equal(start.logits, eager)
        assert not start.report.fallbacks
        assert not LocalStore(root, print).check()
        if number % 3:
            continue
        again = Start(build("qwen3"), root, prompt(tokens=5))  # what was damaged was replaced
        assert (again.report.start, again.compiler.compiled) == ("warm", 0), (number, start.problems, again.problems)
        assert torch.equal(again.logits, eager)


# -- kills -------------------------------------------------------------------------------------------------


def worker(root: Path, log: Path, *options: str) -> subprocess.Popen[str]:
    """A process that starts the model."""
    paths = os.pathsep.join([str(WORKER.parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(root), str(log), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": paths},
        text=True,
    )


def outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What it printed."""
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    told: dict[str, Any] = json.loads(said.splitlines()[-1])
    return told


def test_killed_at_any_moment(tmp_path: Path, eager: torch.Tensor) -> None:
    """Processes that write to a store, each killed at a random moment: forks of this one, as they start at once."""
    root, draw = tmp_path / "store", random.Random(2)
    payloads = {f"{number:02x}" + "d" * 62: draw.randbytes(200_000) for number in range(40)}
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                store = ArtifactStore(root)
                while True:
                    for key, payload in payloads.items():
                        with store.lock("piece", key, 5):
                            store.put("piece", key, payload)
            os._exit(1)
        time.sleep(draw.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        store = ArtifactStore(root)
        assert not store.local.check()
        for key, payload in payloads.items():
            assert store.get("piece", key) in (None, payload)
            with store.lock("piece", key, 0) as held:
                assert held
        assert not store.problems
    assert store.counts["piece hits"]
    for part in root.rglob(".part-*"):
        os.utime(part, (1e9, 1e9))
    store.local.prune(10**9)
    assert not list(root.rglob(".part-*"))


def test_a_start_that_was_killed(tmp_path: Path, eager: torch.Tensor) -> None:
    """Whole starts, killed at random moments, and one in a process of its own while it compiles; the next goes on."""
    draw = random.Random(3)
    for _ in range(KILLS // 2):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                Start(build("qwen3"), tmp_path / "store", prompt(tokens=5))
            os._exit(1)
        time.sleep(draw.uniform(0.0, 0.6))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not LocalStore(tmp_path / "store", print).check()
    assert torch.equal(Start(build("qwen3"), tmp_path / "store", prompt(tokens=5)).logits, eager)
    shutil.rmtree(tmp_path / "store")
    process = worker(tmp_path / "store", tmp_path / "log", "slow")
    while not (tmp_path / "log").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not LocalStore(tmp_path / "store", print).check()
    begin = time.monotonic()
    assert torch.equal(Start(build("qwen3"), tmp_path / "store", prompt(tokens=5)).logits, eager)
    assert time.monotonic() - begin < 30  # no lock outlived it


# -- no room, and no leave to write ------------------------------------------------------------------------


def _no_room(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _no_leave(*_: Any, **__: Any) -> Any:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize("name", ["fsync", "replace", "mkdir"])
def test_a_full_disk(tmp_path: Path, eager: torch.Tensor, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(f"glowplug.store.{'local' if name != 'mkdir' else 'private'}.os.{name}", _no_room)
    start = Start(build("qwen3"), tmp_path / "store", prompt(tokens=5))
    monkeypatch.undo()
    assert torch.equal(start.logits, eager)
    assert not start.report.fallbacks
    assert "No space left" in start.problems
    assert not list((tmp_path / "store").rglob(".part-*"))
    assert not list((tmp_path / "store").rglob("*.glow"))


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    told = outcome(worker(tmp_path / "store", tmp_path / "log", "small files"))
    assert told["equal"]
    assert "File too large" in told["problems"]
    assert not LocalStore(tmp_path / "store", print).entries()


@contextlib.contextmanager
def _mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory, where this process may mount one."""
    folder.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", f"mode=0700,{options}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        done = False
    if not done:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=False)


def test_a_full_file_system(tmp_path: Path, eager: torch.Tensor) -> None:
    with _mounted(tmp_path / "small", "size=16k"):
        start = Start(build("qwen3"), tmp_path / "small" / "store", prompt(tokens=5))
        assert not LocalStore(tmp_path / "small" / "store", print).check()
    assert torch.equal(start.logits, eager)
    assert "No space left" in start.problems


def test_a_read_only_file_system(populated: Path, tmp_path: Path, eager: torch.Tensor) -> None:
    with _mounted(tmp_path / "fixed", "size=64m"):
        shutil.copytree(populated, tmp_path / "fixed" / "store")
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "fixed")], check=True)
        warm = Start(build("qwen3"), tmp_path / "fixed" / "store", prompt(tokens=5))
        other = Start(build("qwen3", layers=5), tmp_path / "fixed" / "store", prompt(tokens=5))
    assert torch.equal(warm.logits, eager)
    assert (warm.report.start, warm.compiler.compiled) == ("warm", 0)
    assert not warm.problems
    assert not other.report.fallbacks
    assert "Read-only" in other.problems


def test_a_store_that_can_not_be_written_to(
    populated: Path, tmp_path: Path, eager: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(populated, tmp_path / "store")
    for path in (tmp_path / "store").rglob("*.glow"):
        path.write_bytes(path.read_bytes()[:-1])
    for name in ("tempfile.mkstemp", "os.utime", "os.replace", "FileLock.acquire"):
        monkeypatch.setattr(f"glowplug.store.local.{name}", _no_leave)
    monkeypatch.setattr(Path, "unlink", _no_leave)
    start = Start(build("qwen3"), tmp_path / "store", prompt(tokens=5))
    monkeypatch.undo()
    assert torch.equal(start.logits, eager)
    assert not start.report.fallbacks
    assert "Read-only" in start.problems


# -- two at once -------------------------------------------------------------------------------------------


def test_two_at_once_compile_each_piece_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    both = [worker(tmp_path / "store", log, "slow") for _ in range(2)]
    told = [outcome(process) for process in both]
    assert all(found["equal"] and not found["problems"] for found in told)
    pieces = len([entry for entry in LocalStore(tmp_path / "store", print).entries() if entry.kind == "piece"])
    assert len(log.read_text().splitlines()) == pieces == sum(found["compiled"] for found in told)
