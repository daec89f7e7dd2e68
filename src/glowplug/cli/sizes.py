"""Sizes and ages as people write and read them."""

from __future__ import annotations

import re

from glowplug.errors import UsageError

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB|B)?\s*$", re.IGNORECASE)


def read_size(text: str) -> int:
    """Bytes, from a text such as `500M` or `2GiB`.

    Raises:
        UsageError: the text is not a size.
    """
    match = _SIZE.match(text)
    if match is None:
        raise UsageError(f"{text!r} is no size; write it as 500M or 2G")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if size >= 2**63:
        raise UsageError(f"{text[:40]!r} is more than any disk holds")
    return int(size)


def show_size(size: int) -> str:
    """A size with its unit."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024  # type: ignore[assignment]
    return f"{size:.1f} GiB"


def show_age(seconds: float) -> str:
    """How long ago."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
