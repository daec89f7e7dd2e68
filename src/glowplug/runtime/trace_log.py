"""Writes the pieces to torch's structured trace, so that `TORCH_TRACE` and tlparse show them.

Uses `trace_structured` (private; checked on torch 2.11 and 2.13). Tracing is a help: without it, nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.split import Piece, Step

try:
    from torch._logging import trace_structured
except ImportError:  # pragma: no cover - depends on the torch installed
    trace_structured = None  # type: ignore[assignment]


def log_artifact(name: str, text: str, encoding: str = "string") -> None:
    """Add one artifact to the structured trace, if one is being written."""
    if trace_structured is not None:
        trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=lambda: text)


def log_pieces(steps: Sequence[Step], prints: Sequence[Fingerprint | None], program: str) -> None:
    """Add a program, the table of its pieces, and the graph of each distinct piece."""
    table: list[dict[str, Any]] = []
    seen: set[Fingerprint] = set()
    for index, (step, found) in enumerate(zip(steps, prints, strict=True)):
        if isinstance(step, Piece) and found is not None:
            table.append({"step": index, "piece": found.digest[:12], "compiled": found not in seen})
            if found not in seen:
                log_artifact(f"glowplug_piece_{found.digest[:12]}", str(found))
            seen.add(found)
        elif not isinstance(step, Piece):
            table.append({"step": index, "op": step.op.name})
    log_artifact("glowplug_pieces", json.dumps(table), "json")
    log_artifact("glowplug_program", program)
