"""Two small trained models that are part of the package, for the demonstration, examples and tests."""

from __future__ import annotations

from pathlib import Path

from glowplug.errors import UsageError

CHECKPOINTS = ("tiny-gpt-oss", "tiny-ernie-vl")


def find_checkpoint(name: str) -> Path:
    """The folder of one of `CHECKPOINTS`, with weights and tokenizer, as transformers saves them.

    Raises:
        UsageError: there is none of that name; the message lists them.
    """
    if name not in CHECKPOINTS:
        raise UsageError(f"no checkpoint {name!r} in glowplug; there are {' and '.join(CHECKPOINTS)}")
    return Path(__file__).parent / name
