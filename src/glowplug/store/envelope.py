"""The envelope around an artifact: header, checksum and signature, all verified before the payload is used.

    GLOWPLUG-ARTIFACT 2\\n
    {"kind": ..., "key": ..., "size": ..., "sha256": ..., "made": ..., "about": ..., "signature": ...}\\n
    payload

The checksum covers kind, key and payload, so the header of one artifact does not pass with the payload of another.
The signature, an HMAC-SHA256 (RFC 2104), covers everything else in the header.
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
    """A secret of at least 16 bytes that signs artifacts."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) < _SHORTEST_KEY:
            raise UsageError(f"a signing key has at least {_SHORTEST_KEY} bytes; this one has {len(self.secret)}")

    @classmethod
    def from_file(cls, path: str | Path) -> SigningKey:
        """The key in a file, stripped of surrounding white space.

        Raises:
            UsageError: the file can't be read, other users can read it, or the key is too short.
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
        """The key in `GLOWPLUG_SIGNING_KEY` or in the file `GLOWPLUG_SIGNING_KEY_FILE`; None if neither is set."""
        text, path = os.environ.get(KEY_VARIABLE), os.environ.get(KEY_FILE_VARIABLE)
        if text and path:
            raise UsageError(f"{KEY_VARIABLE} and {KEY_FILE_VARIABLE} are both set; set one of them")
        if text:
            return cls(text.strip().encode())
        return cls.from_file(path) if path else None

    def sign(self, header: Header) -> str:
        """The signature over a header's other fields, in hex."""
        text = json.dumps([header.kind, header.key, header.size, header.sha256, header.made, header.about])
        return hmac.new(self.secret, text.encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Header:
    """The header of an envelope.

    Attributes:
        kind: `"piece"`, `"graph"` (of a piece that is still being compiled), `"inside"` (an op body) or `"manifest"`
            (a record).
        key: the artifact's address.
        size: size of the payload in bytes.
        sha256: the checksum, in hex.
        made: creation time, in seconds since 1970.
        about: a description for people.
        signature: in hex; empty if unsigned.
    """

    kind: str
    key: str
    size: int
    sha256: str
    made: float
    about: str = ""
    signature: str = ""


def _checksum(kind: str, key: str, payload: bytes) -> str:
    digest = hashlib.sha256(f"{kind}\n{key}\n".encode(errors="replace"))
    digest.update(payload)
    return digest.hexdigest()


def pack(kind: str, key: str, payload: bytes, signing_key: SigningKey | None, about: str = "") -> bytes:
    """Put a payload into an envelope."""
    header = Header(kind, key, len(payload), _checksum(kind, key, payload), round(time.time(), 3), about[:200])
    if signing_key is not None:
        header = replace(header, signature=signing_key.sign(header))
    return MAGIC + json.dumps(asdict(header)).encode() + b"\n" + payload


def read_header(start: bytes) -> tuple[Header, int]:
    """The header at the start of an envelope, and the offset of the payload; ArtifactError for anything else."""
    if not start.startswith(MAGIC):
        raise ArtifactError("it is not an artifact of this version of glowplug")
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
    """The verified payload of an envelope.

    Args:
        content: the envelope.
        kind, key: the artifact that it must hold.
        signing_key: the key that must have signed it. With None, the signature is ignored.

    Raises:
        UnsignedArtifactError: the signature is missing or wrong.
        ArtifactError: the envelope is damaged, truncated, or holds another artifact.
    """
    header, start = read_header(content)
    if (header.kind, header.key) != (kind, key):
        what = f"{header.kind[:12]} {header.key[:12]}"
        raise ArtifactError(f"it is {what!a} in the place of {kind} {key[:12]}")
    payload = content[start:]
    if len(payload) != header.size:
        raise ArtifactError(f"it has {len(payload)} of {header.size} bytes")
    if _checksum(kind, key, payload) != header.sha256:
        raise ArtifactError("its checksum is wrong")
    if signing_key is not None:
        if not header.signature:
            raise UnsignedArtifactError("it is not signed")
        if not hmac.compare_digest(signing_key.sign(header).encode(), header.signature.encode(errors="replace")):
            raise UnsignedArtifactError("its signature is from another key")
    return payload


def plain(text: str) -> str:
    """Untrusted text with unprintable characters replaced: they could control a terminal or fail to encode."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
