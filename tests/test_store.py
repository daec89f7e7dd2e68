"""The local store: envelopes, whole files or none, nobody else's hands on it, locks, pruning, and its commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from glowplug.cli import app
from glowplug.cli.sizes import read_size, show_age, show_size
from glowplug.errors import ArtifactError, StoreError, UnsignedArtifactError, UsageError
from glowplug.store import ArtifactStore, LocalStore, SigningKey, open_store, opening
from glowplug.store.envelope import MAGIC, pack, read_header, unpack
from glowplug.store.manifest import Manifest, _expression, dtype_from_name

KEY = "ab" + "c" * 62
OTHER = "ef" + "0" * 62
SECRET = SigningKey(b"sixteen bytes are enough")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """An empty store."""
    return ArtifactStore(tmp_path / "store")


def envelope(**changes: Any) -> bytes:
    """An envelope whose header says something else."""
    content = pack("piece", KEY, b"payload", SECRET)
    header, start = read_header(content)
    return MAGIC + json.dumps({**vars(header), **changes}).encode() + b"\n" + content[start:]


# -- envelopes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [b"", b"x", b"\n" * 99, bytes(range(256)) * 999])
@pytest.mark.parametrize("signing_key", [None, SECRET])
def test_payload_survives(payload: bytes, signing_key: SigningKey | None) -> None:
    assert (
        unpack(pack("piece", KEY, payload, signing_key, about="\U0001f600" * 500), "piece", KEY, signing_key) == payload
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "manifest"},
        {"key": OTHER},
        {"key": "../../../etc/passwd"},
        {"size": 6},
        {"size": float("nan")},
        {"size": float("inf")},
        {"size": 10**400},
        {"size": True},
        {"size": "7"},
        {"made": 10**400},
        {"made": None},
        {"sha256": "é" * 64},
        {"sha256": "\ud800"},
        {"sha256": 0},
        {"about": ["x"]},
        {"unknown": 1},
    ],
)
def test_wrong_headers_are_noticed(changes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError):
        unpack(envelope(**changes), "piece", KEY, None)


@pytest.mark.parametrize("letter", ["\ud800", "\x1b[2J", "\x00"])
def test_what_an_artifact_says_does_not_reach_the_log_raw(
    letter: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A hostile header must not steer a terminal, nor break a log that is written as UTF-8."""
    store = ArtifactStore(tmp_path)
    store.put("piece", KEY, b"payload")
    (entry,) = store.local.entries()
    entry.path.write_bytes(envelope(**{f"x{letter}": 1}))
    assert store.get("piece", KEY) is None
    (problem,) = store.problems
    assert "is not used" in problem and "?" in problem
    assert problem.isprintable() and problem in caplog.text
    caplog.text.encode()


@pytest.mark.parametrize("signature", ["", "0" * 64, "é", "\ud800", "x" * 2000])
def test_wrong_signatures_are_refused(signature: str) -> None:
    assert unpack(envelope(signature=signature), "piece", KEY, None) == b"payload"
    with pytest.raises(UnsignedArtifactError):
        unpack(envelope(signature=signature), "piece", KEY, SECRET)


@pytest.mark.parametrize("changes", [{"made": 0.5}, {"about": "other"}])
def test_the_signature_covers_the_header(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsignedArtifactError):
        unpack(envelope(**changes), "piece", KEY, SECRET)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        MAGIC,
        MAGIC[:-1],
        MAGIC.replace(b"1", b"0") + b"{}\n",
        MAGIC + b"[" * 4000 + b"\n",
        MAGIC + b"{}" + b" " * 9000 + b"\n",
        MAGIC + b"null\n",
        MAGIC + b"\xff\xfe\n",
        MAGIC + b'{"kind": ' + b"9" * 4000 + b"}\n",
    ],
)
def test_what_is_no_envelope(content: bytes) -> None:
    with pytest.raises(ArtifactError):
        read_header(content)


# -- keys --------------------------------------------------------------------------------------------------


def test_signing_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_bytes(SECRET.secret + b"\n")
    file.chmod(0o644)
    with pytest.raises(UsageError, match="others can read"):
        SigningKey.from_file(file)
    file.chmod(0o600)
    assert SigningKey.from_file(file) == SECRET
    assert "sixteen" not in repr(SECRET)
    for wrong in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="can't read the signing key"):
            SigningKey.from_file(wrong)
    with pytest.raises(UsageError, match="at least 16"):
        SigningKey(b"short")
    monkeypatch.setenv("GLOWPLUG_SIGNING_KEY_FILE", str(file))
    assert SigningKey.from_environment() == SECRET
    monkeypatch.setenv("GLOWPLUG_SIGNING_KEY", "x" * 16)
    with pytest.raises(UsageError, match="both set"):
        SigningKey.from_environment()


# -- the folder --------------------------------------------------------------------------------------------


def test_what_was_put_is_there(store: ArtifactStore) -> None:
    assert store.get("piece", KEY) is None
    store.put("piece", KEY, b"payload", about="a piece")
    assert store.get("piece", KEY) == b"payload"
    assert store.get("manifest", KEY) is None
    assert store.counts == {"piece misses": 1, "piece stored": 1, "piece hits": 1, "manifest misses": 1}
    assert not store.problems


def test_it_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = ArtifactStore(tmp_path / "above" / "store")
        store.put("piece", KEY, b"payload")
        with store.lock("piece", KEY):
            pass
    finally:
        os.umask(before)
    for path in (tmp_path / "above").rglob("*"):
        assert not path.stat().st_mode & 0o022, path
    assert ArtifactStore(tmp_path / "above" / "store").get("piece", KEY) == b"payload"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_of_others_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "above" / "store").mkdir(parents=True)
    for path in (tmp_path / "above" / "store", tmp_path / "above"):
        path.chmod(mode)
        with pytest.raises(StoreError, match="can be written to by others"):
            open_store(tmp_path / "above" / "store")
        path.chmod(0o755)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "above" / "store")
    (tmp_path / "above").chmod(mode)
    with pytest.raises(StoreError, match="can be written to by others"):
        open_store(link)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_another_users_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    os.chown(tmp_path / "store", 12345, 12345)
    with pytest.raises(StoreError, match="belongs to another user"):
        open_store(tmp_path / "store")
    sticky = tmp_path / "sticky"
    (sticky / "store").mkdir(parents=True)
    sticky.chmod(0o1777)
    assert open_store(sticky / "store") is not None
    os.chown(sticky, 12345, 12345)  # who owns a sticky folder may rename what is in it
    with pytest.raises(StoreError, match="belongs to another user"):
        open_store(sticky / "store")


@pytest.mark.parametrize("what", ["pieces", "pieces/ab", f"pieces/ab/{KEY}.glow"])
def test_nothing_is_read_that_others_can_write(store: ArtifactStore, what: str) -> None:
    store.put("piece", KEY, b"payload")
    (store.local.root / what).chmod(0o777)
    assert store.get("piece", KEY) is None
    assert "others can write" in store.problems[0]


def test_a_link_that_is_changed_later_is_not_followed(tmp_path: Path) -> None:
    for name in ("mine", "other"):
        (tmp_path / name).mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to("mine")
    store = ArtifactStore(link)
    ArtifactStore(tmp_path / "other").put("piece", KEY, b"planted")
    link.unlink()
    link.symlink_to("other")
    assert store.get("piece", KEY) is None


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dead").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file", "dead", "loop"):
        with pytest.raises(StoreError, match="not a folder"):
            open_store(tmp_path / name)
    for place in (tmp_path / "file" / "store", "x" * 300, "a\0b"):
        found = open_store(place)  # can't be made: noted, and nothing more
        assert found is not None
        found.put("piece", KEY, b"payload")
        assert found.get("piece", KEY) is None
        assert "can't be made" in found.problems[0]
        with found.lock("piece", KEY) as held:
            assert held


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "folder", "dead link", "loop"])
def test_odd_things_in_a_files_place(store: ArtifactStore, kind: str) -> None:
    path = store.local.path("piece", KEY)
    path.parent.mkdir(parents=True, mode=0o700)
    {
        "pipe": lambda: os.mkfifo(path, 0o600),
        "folder": lambda: (path / "x").mkdir(parents=True),
        "dead link": lambda: path.symlink_to("nowhere"),
        "loop": lambda: path.symlink_to(path.name),
    }[kind]()
    assert store.get("piece", KEY) is None
    store.local.entries(), store.local.check()
    store.put("piece", KEY, b"payload")
    assert store.get("piece", KEY) == (None if kind == "folder" else b"payload")


def test_which_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_store() is None  # the tests' own setting
    for text in ("off", "OFF", "0", "none"):
        assert open_store(text) is None
    monkeypatch.setenv("GLOWPLUG_CACHE", str(tmp_path / "named"))
    assert open_store().place == str(tmp_path / "named")
    assert open_store("").place == str(tmp_path / "named")
    assert open_store(tmp_path / "given").place == str(tmp_path / "given")
    monkeypatch.delenv("GLOWPLUG_CACHE")
    monkeypatch.setattr(opening, "default_root", lambda: tmp_path / "own")
    assert open_store().place == str(tmp_path / "own")
    (tmp_path / "own").chmod(0o777)
    assert open_store() is None  # nobody asked for it
    monkeypatch.setattr(opening, "default_root", lambda: Path("~/.cache"))
    assert open_store() is None


# -- locks -------------------------------------------------------------------------------------------------


def test_one_holds_a_lock_at_a_time(store: ArtifactStore) -> None:
    seen = []

    def try_it() -> None:
        with store.lock("piece", KEY, 0) as held:
            seen.append(held)
        with store.lock("piece", OTHER, 0) as held:
            seen.append(held)

    with store.lock("piece", KEY) as held:
        assert held
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
    assert seen == [False, True]


def test_a_killed_process_holds_no_lock(store: ArtifactStore) -> None:
    code = (
        "import sys, time; from pathlib import Path; from glowplug.store import ArtifactStore\n"
        f"with ArtifactStore(Path(sys.argv[1])).lock('piece', '{KEY}'):\n    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, store.place], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with store.lock("piece", KEY, 0) as held:
        assert not held
    process.kill()
    process.wait()
    with store.lock("piece", KEY, 5) as held:
        assert held


# -- manifests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["s0", "Eq(Mod(s0, 8), 0)", "2*s0 + 1 <= u1", "(s0 < 4) & (s1 >= 2)", "s0**2 - 1"])
def test_relations_of_sizes_are_read(text: str) -> None:
    assert _expression(str(_expression(text))) == _expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "(lambda: ().__class__.__base__.__subclasses__())()",
        "[x.__class__ for x in (1,)]",
        "().__class__",
        "__import__('os')",
        "s0.__class__",
        "'text'",
        "9**9**9",
        "s0**(10**9)",
        "s0[0]",
        "(s0 := 1)",
        "Eq(*s0)",
        "1 " + "+ 1" * 2000,
    ],
)
def test_relations_run_no_code(text: str) -> None:
    with pytest.raises(ArtifactError):
        _expression(text)


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100000, b'{"schema": 1}', b'{"schema": 99}', b"\xff", b"null"])
def test_what_is_no_manifest(content: bytes) -> None:
    with pytest.raises(ArtifactError):
        Manifest.from_bytes(content)


def test_dtypes_by_name() -> None:
    assert dtype_from_name("torch.bfloat16") is torch.bfloat16
    with pytest.raises(ArtifactError):
        dtype_from_name("load")


# -- pruning, and the commands -----------------------------------------------------------------------------


def fill(root: Path, count: int = 4, size: int = 1000) -> ArtifactStore:
    """A store of artifacts, the last one used last."""
    store = ArtifactStore(root)
    for number in range(count):
        key = f"{number:02d}" + "a" * 62
        store.put("piece", key, bytes(size), about=f"number {number} [/red]\x1b[31m")
        os.utime(store.local.path("piece", key), (1e9 + number, 1e9 + number))
    return store


def run(*arguments: str | Path) -> Any:
    """A command line, in this process."""
    return CliRunner().invoke(app, ["cache", *map(str, arguments)])


def test_prune_keeps_what_was_used_last(tmp_path: Path) -> None:
    local = fill(tmp_path / "store").local
    size = max(entry.size for entry in local.entries())
    assert local.prune(4 * size) == []
    assert [entry.key[:2] for entry in local.prune(2 * size + 1)] == ["00", "01"]
    assert [entry.key[:2] for entry in local.entries()] == ["03", "02"]
    assert local.read("piece", "02" + "a" * 62) is not None  # which uses it
    assert [entry.key[:2] for entry in local.prune(size)] == ["03"]
    assert len(local.prune(0)) == 1


def test_prune_removes_what_killed_processes_left(tmp_path: Path) -> None:
    local = fill(tmp_path / "store").local
    folder = next(local.root.glob("pieces/*"))
    (local.root / "locks").mkdir()
    used = local.entries()[0]
    paths = [folder / ".part-old", folder / ".part-new", local.root / "locks" / "piece-gone.lock"]
    paths.append(local.root / "locks" / f"piece-{used.key}.lock")
    for path in paths:
        path.write_bytes(b"half")
        if path != paths[1]:
            os.utime(path, (1e9, 1e9))
    assert len(local.entries()) == 4
    assert not local.check()
    local.prune(10**9)
    assert [path.exists() for path in paths] == [False, True, False, True]


def test_ls(tmp_path: Path) -> None:
    fill(tmp_path / "store")
    (tmp_path / "store" / "pieces" / "00" / "odd.glow").write_bytes(b"?")
    result = run("ls", "--cache", tmp_path / "store")
    assert result.exit_code == 0, result.output
    for word in ("number 3 [/red]?[31m", "1.3 KiB", "5 artifacts", "not readable", "signed", "03aaaaaaaaaa"):
        assert word in result.stdout
    assert run("ls", "--cache", tmp_path / "none").exit_code == 2
    assert not (tmp_path / "none").exists()


def test_verify(tmp_path: Path) -> None:
    local = fill(tmp_path / "store").local
    arguments = ("verify", "--cache", tmp_path / "store")
    assert run(*arguments).exit_code == 0
    damaged, good = local.entries()[0].path, local.entries()[1].path
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    misplaced = local.root / "pieces" / "zz" / good.name
    misplaced.parent.mkdir(mode=0o700)
    misplaced.write_bytes(good.read_bytes())
    result = run(*arguments)
    assert result.exit_code == 1
    assert "checksum" in result.stdout
    assert "nobody looks" in result.stdout
    assert "3 artifacts are whole, 2 are not" in result.stdout
    assert run(*arguments, "--delete").exit_code == 1
    assert not damaged.exists() and not misplaced.exists() and good.exists()
    assert "3 artifacts are whole, 0 are not" in run(*arguments).stdout


def test_verify_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "store")
    assert run("verify", "--signed", "--cache", tmp_path / "store").exit_code == 2
    monkeypatch.setenv("GLOWPLUG_SIGNING_KEY", "k" * 16)
    ArtifactStore(tmp_path / "store", signing_key=SigningKey(b"k" * 16)).put("piece", KEY, b"x")
    result = run("verify", "--signed", "--cache", tmp_path / "store")
    assert result.exit_code == 1
    assert "1 artifacts are whole, 4 are not" in result.stdout


def test_prune_command(tmp_path: Path) -> None:
    fill(tmp_path / "store")
    result = run("prune", "--max-size", "3K", "--cache", tmp_path / "store")
    assert result.exit_code == 0, result.output
    assert "deleted 2 artifacts" in result.stdout
    assert "2 left" in result.stdout


@pytest.mark.parametrize("arguments", [("ls",), ("verify",), ("prune", "--max-size", "1")])
def test_commands_without_a_store(arguments: tuple[str, ...], tmp_path: Path) -> None:
    assert run(*arguments).exit_code == 2  # off
    (tmp_path / "open").mkdir(mode=0o700)
    (tmp_path / "open").chmod(0o777)
    result = run(*arguments, "--cache", tmp_path / "open")
    assert result.exit_code == 2
    assert "can be written to by others" in result.stderr


def test_sizes() -> None:
    assert [read_size(text) for text in ("0", "5", "2K", "1.5MB", "2GiB")] == [0, 5, 2048, 1572864, 2**31]
    for text in ("", "-1", "many", "5X", "9" * 400, "1e3"):
        with pytest.raises(UsageError):
            read_size(text)
    assert [show_size(size) for size in (0, 1023, 2048, 2**30)] == ["0 B", "1023 B", "2.0 KiB", "1.0 GiB"]
    assert [show_age(age) for age in (-5, 59, 60, 7200, 3 * 86400)] == ["0 s", "59 s", "1 min", "2 h", "3 d"]


def test_reading_is_a_use(store: ArtifactStore) -> None:
    store.put("piece", KEY, b"payload")
    os.utime(store.local.path("piece", KEY), (1e9, 1e9))
    store.get("piece", KEY)
    assert LocalStore(store.local.root, print).entries()[0].used > time.time() - 60
