"""The record of one measurement: plain data for the results file."""

from __future__ import annotations

from typing import Any

import torch

from glowplug.bench.spec import Spec
from glowplug.bench.strategies import get_strategy

Record = dict[str, Any]
"""One measurement; `empty_record` lists its keys."""


def empty_record(spec: Spec) -> Record:
    """A record with everything known before measuring, and None for every measured value.

    Keys, with units: model, depth, width, strategy, experts, compiler, device, dtype, torch (version), cold_start_s,
    phases (name -> s), pieces, distinct_pieces, pending_pieces (still uncompiled at the second token),
    steady_ms ({"decode": ms, "prefill128": ms}), overhead_us (see `glowplug.bench.overhead`), peak_rss_mb and
    cuda_peak_mb (MiB), max_rel_err, fallback (reasons), error.

    Raises:
        UsageError: unknown strategy.
    """
    compiles_by = get_strategy(spec.strategy).compiles_by
    ours = compiles_by == "glowplug"
    return {
        "model": spec.model,
        "depth": spec.depth,
        "width": spec.width,
        "strategy": spec.strategy,
        "experts": spec.experts if ours else "inline",
        "compiler": spec.compiler if ours else {"": "none", "torch": "inductor"}[compiles_by],
        "device": spec.device,
        "dtype": spec.dtype,
        "torch": torch.__version__,
        "cold_start_s": None,
        "phases": {},
        "pieces": None,
        "distinct_pieces": None,
        "pending_pieces": None,
        "steady_ms": {"decode": None, "prefill128": None},
        "overhead_us": {},
        "peak_rss_mb": None,
        "cuda_peak_mb": None,
        "max_rel_err": None,
        "fallback": [],
        "error": None,
    }


def error_record(spec: Spec, error: str) -> Record:
    """The record of a measurement that failed."""
    return {**empty_record(spec), "error": error}
