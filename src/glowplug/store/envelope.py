"""The envelope of an artifact: what it is, its checksum, its signature; read and proved before a byte inside is used.

    GLOWPLUG-ARTIFACT 2\\n
    {"kind": ..., "key": ..., "size": ..., "sha256": ..., "made": ..., "about": ..., "signature": ...}\\n
    payload

The checksum is over kind, key and payload, so that a header and a payload of two artifacts don't pass; the signature,
an HMAC-SHA256 (RFC 2104), is over everything else in the header.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from glowplug.errors import ArtifactError, UnsignedArtifactError, UsageError

MAGIC = b"GLOWPLUG-ARTIFACT 2\n"
KEY_VARIABLE = "GLOWPLUG_SIGNING_KEY"
KEY_FILE_VARIABLE = "GLOWPLUG_SIGNING_KEY_FILE"
_LONGEST_HEADER = 4096
_SHORTEST_KEY = 16
_LONGEST_KEY = 2**16


@dataclass(frozen=True)
class SigningKey:
    """A secret of at least 16 bytes by which artifacts are signed."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) < _SHORTEST_KEY:
            raise UsageError(f"a signing key has at least {_SHORTEST_KEY} bytes; this one has {len(self.secret)}")

    @classmethod
    def from_file(cls, path: str | Path) -> SigningKey:
        """The key in a file: all of its bytes but white space around them.

        Raises:
            UsageError: it can't be read, others can read it, or it is too short.
        """
        place = Path(os.path.expanduser(path))
        try:
            with place.open("rb") as file:
                status = os.fstat(file.fileno())
                secret = file.read(_LONGEST_KEY).strip()
        except OSError as exc:
            raise UsageError(f"can't read the signing key {place}: {exc.strerror or exc}") from exc
        if os.name == "posix" and (status.st_mode & 0o077 or status.st_uid not in (os.geteuid(), 0)):
            raise UsageError(f"others can read the signing key {place}; chmod 600 it, as a file of your own")
        return cls(secret)

    @classmethod
    def from_environment(cls) -> SigningKey | None:
        """The key in `GLOWPLUG_SIGNING_KEY`, or in the file that `GLOWPLUG_SIGNING_KEY_FILE` names; None without."""
        text, path = os.environ.get(KEY_VARIABLE), os.environ.get(KEY_FILE_VARIABLE)
        if text and path:
            raise UsageError(f"{KEY_VARIABLE} and {KEY_FILE_VARIABLE} are both set; set one of them")
        if text:
            return cls(text.strip().encode())
        return cls.from_file(path) if path else None

    def sign(self, header: Header) -> str:
        """The signature of everything else in a header, in hex."""
        text = json.dumps([header.kind, header.key, header.size, header.sha256, header.made, header.about])
        return hmac.new(self.secret, text.encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Header:
    """What an envelope says of its artifact.

    Attributes:
        kind: `"piece"`, `"graph"` (of a piece that is being compiled), `"inside"` or `"manifest"` (a record).
        key: its address.
        size: bytes of the payload.
        sha256: the checksum, in hex.
        made: when, in seconds since 1970.
        about: what it is, for people.
        signature: in hex; empty when unsigned.
    """

    kind: str
    key: str
    size: int
    sha256: str
    made: float
    about: str = ""
    signature: str = ""


def _checksum(kind: str, key: str, payload: bytes) -> str:
    found = hashlib.sha256(f"{kind}\n{key}\n".encode(errors="replace"))
    found.update(payload)
    return found.hexdigest()


def pack(kind: str, key: str, payload: bytes, signing_key: SigningKey | None, about: str = "") -> bytes:
    """Put a payload into an envelope."""
    header = Header(kind, key, len(payload), _checksum(kind, key, payload), round(time.time(), 3), about[:200])
    if signing_key is not None:
        header = replace(header, signature=signing_key.sign(header))
    return MAGIC + json.dumps(asdict(header)).encode() + b"\n" + payload


def read_header(start: bytes) -> tuple[Header, int]:
    """The header at the start of an envelope, and where the payload begins.

    Raises:
        ArtifactError: it is none.
    """
    if not start.startswith(MAGIC):
        raise ArtifactError("it is no artifact of this version of glowplug")
    end = start.find(b"\n", len(MAGIC), len(MAGIC) + _LONGEST_HEADER)
    if end < 0:
        raise ArtifactError("its header has no end")
    try:
        header = Header(**json.loads(start[len(MAGIC) : end]))
    except (ValueError, TypeError, RecursionError) as exc:
        raise ArtifactError(f"its header can't be read: {exc}"[:200]) from exc
    texts = (header.kind, header.key, header.sha256, header.about, header.signature)
    numbers = all(type(n) in (int, float) and abs(n) < 2**63 for n in (header.size, header.made))  # and so not NaN
    if not numbers or not all(isinstance(text, str) for text in texts):
        raise ArtifactError("its header has values of wrong types")
    return header, end + 1


def unpack(content: bytes, kind: str, key: str, signing_key: SigningKey | None) -> bytes:
    """The payload of an envelope, proved to be what was asked for.

    Args:
        content: the envelope.
        kind, key: what was asked for.
        signing_key: the signature must be by this key; None: it may be missing, and is not looked at.

    Raises:
        UnsignedArtifactError: the signature is missing or wrong.
        ArtifactError: it is damaged, cut short, or something else.
    """
    header, start = read_header(content)
    if (header.kind, header.key) != (kind, key):
        what = f"{header.kind[:12]} {header.key[:12]}"
        raise ArtifactError(f"it is {what!a}, put in the place of {kind} {key[:12]}")
    payload = content[start:]
    if len(payload) != header.size:
        raise ArtifactError(f"it has {len(payload)} of {header.size} bytes")
    if _checksum(kind, key, payload) != header.sha256:
        raise ArtifactError("its checksum is wrong")
    if signing_key is not None:
        if not header.signature:
            raise UnsignedArtifactError("it is not signed")
        if not hmac.compare_digest(signing_key.sign(header).encode(), header.signature.encode(errors="replace")):
            raise UnsignedArtifactError("its signature is not by this key")
    return payload


def plain(text: str) -> str:
    """A text that an artifact had a part in, without what would steer a terminal or can't be encoded."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
