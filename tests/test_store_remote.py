"""Remote stores: signed or refused, before a byte is unpickled; the local folder in front; slower, never failed."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from families import build, prompt
from glowplug.compilers import get_compiler
from glowplug.compilers.base import StoringCompiler
from glowplug.errors import StoreError
from glowplug.program import PieceStore
from glowplug.store import ArtifactStore, RemoteStore, SigningKey, open_store, opening
from glowplug.store.envelope import pack
from storing import PickleCompiler, Start, Trap

SECRET = SigningKey(b"sixteen bytes are enough")
OTHER = SigningKey(b"another key, of someone else")
KEY = "ab" + "c" * 62


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A remote store in a folder."""
    return f"file://{tmp_path}/remote"


def at(tmp_path: Path, url: str, name: str, key: SigningKey = SECRET) -> ArtifactStore:
    """The store of one machine."""
    return ArtifactStore(tmp_path / name, url, key)


def plant(url: str, content: bytes, kind: str = "piece", key: str = KEY) -> None:
    """What an attacker who can write to the remote store does."""
    files, root = fsspec.core.url_to_fs(url)
    path = f"{root}/{kind}s/{key[:2]}/{key}.glow"
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    files.pipe_file(path, content)


def test_another_machine_finds_it(tmp_path: Path, url: str) -> None:
    at(tmp_path, url, "one").put("piece", KEY, b"payload")
    other = at(tmp_path, url, "other")
    assert other.get("piece", KEY) == b"payload"
    fsspec.core.url_to_fs(url)[0].rm(f"{tmp_path}/remote", recursive=True)
    again = at(tmp_path, url, "other")
    assert again.get("piece", KEY) == b"payload"  # the folder in front
    assert not other.problems + again.problems


def test_memory_is_a_store_too(tmp_path: Path) -> None:
    at(tmp_path, "memory://bucket", "one").put("piece", KEY, b"payload")
    assert at(tmp_path, "memory://bucket", "other").get("piece", KEY) == b"payload"


ATTACKS = {
    "unsigned": lambda key, payload: pack("piece", key, payload, None),
    "wrongly signed": lambda key, payload: pack("piece", key, payload, OTHER),
    "swapped": lambda key, payload: pack("piece", KEY, payload, SECRET),
    "payload replaced": lambda key, payload: pack("piece", key, b"x" * len(payload), SECRET)[: -len(payload)] + payload,
    "no envelope": lambda key, payload: payload,
    "longer": lambda key, payload: pack("piece", key, payload, SECRET) + b"x",
    "odd signature": lambda key, payload: pack("piece", key, payload, None).replace(
        b'"signature": ""', b'"signature": "\\ud800"'
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("in_front", [False, True])
def test_nothing_of_a_forged_artifact_is_unpickled(tmp_path: Path, url: str, attack: str, in_front: bool) -> None:
    trace = tmp_path / "it ran"
    payload = pickle.dumps((pickle.dumps(Trap(trace)), pickle.dumps(Trap(trace)), Trap(trace)))
    store = at(tmp_path, url, "store")
    pieces = PieceStore(store, PickleCompiler(), "here")
    key = pieces.key("digest")
    forged = ATTACKS[attack](key, payload)
    if in_front:
        store.local.write("piece", key, forged)
    else:
        plant(url, forged, key=key)
    assert pieces.load("digest") is None
    assert pieces.load_graph("digest") is None
    assert not trace.exists()
    assert store.problems
    if "sign" in attack:
        assert any("signed" in problem or "signature" in problem for problem in store.problems), store.problems
    store.put("piece", key, b"made anew")
    assert at(tmp_path, url, "other").get("piece", key) == b"made anew"


def test_the_trap_works(tmp_path: Path, url: str) -> None:
    """Properly signed, it is loaded: whoever has the key is trusted."""
    trace = tmp_path / "it ran"
    pieces = PieceStore(at(tmp_path, url, "store"), PickleCompiler(), "here")
    pieces.store.put("piece", pieces.key("digest"), pickle.dumps((pickle.dumps(Trap(trace)), b"")))
    assert pieces.load("digest") is None
    assert trace.exists()


def test_a_model_starts_right_beside_forgeries(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "default_root", lambda: tmp_path / "cache" / "artifacts")
    monkeypatch.setenv("GLOWPLUG_SIGNING_KEY", SECRET.secret.decode())
    ids = prompt(tokens=5)
    with torch.no_grad():
        eager = build("qwen3").eval()(ids, use_cache=False).logits
    assert torch.equal(Start(build("qwen3"), url, ids).logits, eager)
    trace = tmp_path / "it ran"
    for file in (tmp_path / "remote").rglob("*.glow"):
        kind, key = file.parent.parent.name.removesuffix("s"), file.stem
        file.write_bytes(pack(kind, key, pickle.dumps((pickle.dumps(Trap(trace)), b"")), OTHER))
    monkeypatch.setattr(opening, "default_root", lambda: tmp_path / "machine 2" / "artifacts")
    start = Start(build("qwen3"), url, ids)
    assert torch.equal(start.logits, eager)
    assert start.report.start == "cold"
    assert "REFUSED" in start.problems
    assert not trace.exists()
    monkeypatch.setattr(opening, "default_root", lambda: tmp_path / "machine 3" / "artifacts")
    start = Start(build("qwen3"), url, ids)  # they were replaced
    assert torch.equal(start.logits, eager)
    assert (start.report.start, start.compiler.compiled) == ("warm", 0)
    assert isinstance(get_compiler(start.compiler), StoringCompiler)


def test_a_url_needs_a_key(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="needs a signing key"):
        open_store(url)
    monkeypatch.setenv("GLOWPLUG_SIGNING_KEY", "x" * 16)
    with pytest.raises(StoreError, match="can't be used"):
        open_store("nosuchprotocol://place")


class _Broken:
    """A file system of which some calls fail."""

    def __init__(self, files: Any, *names: str) -> None:
        self.files, self.names, self.asked = files, names, 0

    def __getattr__(self, name: str) -> Any:
        if name in self.names:
            self.asked += 1
            raise PermissionError("no")
        return getattr(self.files, name)


def test_who_can_not_write_still_reads(tmp_path: Path, url: str) -> None:
    at(tmp_path, url, "one").put("piece", KEY, b"payload")
    store = at(tmp_path, url, "other")
    assert store.remote is not None
    broken = store.remote._files = _Broken(store.remote._files, "pipe_file", "makedirs")
    store.put("piece", "00" * 32, b"new")
    store.put("piece", "11" * 32, b"new")
    assert broken.asked == 1
    assert store.get("piece", KEY) == b"payload"
    assert store.counts["piece stored"] == 2  # in front
    assert "can't be written to" in store.problems[0]


def test_no_password_is_shown(tmp_path: Path) -> None:
    notes: list[str] = []
    remote = RemoteStore("memory://me:secret@host/x", SECRET, notes.append)
    remote._files = _Broken(None, "cat_file")
    assert remote.read("piece", KEY) is None
    assert "can't be read" in notes[0]
    assert "secret" not in notes[0]


# -- a real S3 server --------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3 server, a process of its own."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    port = _free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A user of S3, with a key, on a machine of their own."""
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("GLOWPLUG_SIGNING_KEY", SECRET.secret.decode()),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(opening, "default_root", lambda: tmp_path / "machine 1" / "artifacts")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    return monkeypatch


def test_s3(server: str, s3: pytest.MonkeyPatch, tmp_path: Path) -> None:
    s3.setenv("AWS_ENDPOINT_URL", server)
    ids, place = prompt(tokens=5), "s3://bucket/folder"
    cold = Start(build("qwen3"), place, ids)
    assert not cold.problems
    s3.setattr(opening, "default_root", lambda: tmp_path / "machine 2" / "artifacts")
    warm = Start(build("qwen3"), place, ids)
    assert (warm.report.start, warm.compiler.compiled) == ("warm", 0)
    assert torch.equal(warm.logits, cold.logits)
    assert not warm.problems
    assert warm.report.store is not None
    assert warm.report.store.place == place
    files = fsspec.filesystem("s3")
    for path in files.find("bucket"):
        files.pipe_file(path, files.cat_file(path).replace(b'"signature": "', b'"signature": "0'))
    s3.setattr(opening, "default_root", lambda: tmp_path / "machine 3" / "artifacts")
    refused = Start(build("qwen3"), place, ids)
    assert refused.report.start == "cold"
    assert torch.equal(refused.logits, cold.logits)
    assert "REFUSED" in refused.problems


@pytest.mark.timeout(60)
def test_a_server_that_does_not_answer(s3: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    s3.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{_free_port()}")
    begin = time.monotonic()
    store = open_store("s3://bucket/folder")
    assert store is not None
    assert store.get("piece", KEY) is None
    store.put("piece", KEY, b"payload")
    assert store.get("piece", KEY) == b"payload"
    assert time.monotonic() - begin < 40
    assert "can't be read" in store.problems[0]
