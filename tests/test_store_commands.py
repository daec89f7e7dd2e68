"""Pruning a store, and its commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from glowplug.cli import app
from glowplug.cli.sizes import read_size, show_age, show_size
from glowplug.errors import UsageError
from glowplug.store import ArtifactStore, SigningKey

KEY = "ab" + "c" * 62


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
    assert "3 artifacts whole, 2 not" in result.stdout
    assert run(*arguments, "--delete").exit_code == 1
    assert not damaged.exists() and not misplaced.exists() and good.exists()
    assert "3 artifacts whole, 0 not" in run(*arguments).stdout


def test_verify_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "store")
    assert run("verify", "--signed", "--cache", tmp_path / "store").exit_code == 2
    monkeypatch.setenv("GLOWPLUG_SIGNING_KEY", "k" * 16)
    ArtifactStore(tmp_path / "store", signing_key=SigningKey(b"k" * 16)).put("piece", KEY, b"x")
    result = run("verify", "--signed", "--cache", tmp_path / "store")
    assert result.exit_code == 1
    assert "1 artifact whole, 4 not" in result.stdout


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
