"""What an examination finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One fact about this machine.

    Attributes:
        section: the part of the examination: `"versions"`, `"devices"`, `"compiler"`, `"store"`, `"vllm"`,
            `"environment"` or `"eager"`.
        name: what was examined.
        text: what was found, in one line.
        state: `"ok"`; `"note"`, which may explain something; `"warning"`, something does not work as it should; or
            `"problem"`, which keeps glowplug from compiling.
        advice: what to do about it; empty if there is nothing to do.
    """

    section: str
    name: str
    text: str
    state: State = "ok"
    advice: str = ""
