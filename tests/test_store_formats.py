"""What lies in a store, as bytes: envelopes, the keys that sign them, and manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from glowplug.errors import ArtifactError, UnsignedArtifactError, UsageError
from glowplug.store import ArtifactStore, SigningKey
from glowplug.store.envelope import MAGIC, pack, read_header, unpack
from glowplug.store.manifest import Manifest, _expression, dtype_from_name

KEY = "ab" + "c" * 62
OTHER = "ef" + "0" * 62
SECRET = SigningKey(b"sixteen bytes are enough")


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
        MAGIC.replace(b"2", b"0") + b"{}\n",
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
