"""Writes the pieces to torch's structured trace, so that `TORCH_TRACE` and tlparse show them.

Uses `trace_structured` (private; checked on torch 2.11 and 2.13). Without it, nothing is written.
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
    """Add an artifact to the structured trace, if one is being written."""
    if trace_structured is not None:
        trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=lambda: text)


def log_pieces(steps: Sequence[Step], prints: Sequence[Fingerprint | None], program: str) -> None:
    """Log a program, the table of its pieces, and the graph of each distinct piece."""
    table: list[dict[str, Any]] = []
    seen: set[Fingerprint] = set()
    for index, (step, piece) in enumerate(zip(steps, prints, strict=True)):
        if isinstance(step, Piece) and piece is not None:
            table.append({"step": index, "piece": piece.digest[:12], "compiled": piece not in seen})
            if piece not in seen:
                log_artifact(f"glowplug_piece_{piece.digest[:12]}", str(piece))
            seen.add(piece)
        elif not isinstance(step, Piece):
            table.append({"step": index, "op": step.op.name})
    log_artifact("glowplug_pieces", json.dumps(table), "json")
    log_artifact("glowplug_program", program)
