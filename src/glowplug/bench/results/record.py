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
    steady_ms ({"decode": ms, "prefill128": ms}), overhead_us (on a CPU; see `glowplug.bench.overhead`), peak_rss_mb
    and cuda_peak_mb (MiB), max_rel_err, gpu, fallback (reasons), error.

    The cold start lasts until the second token; on a GPU that is the second of `generate` over a static cache.

    `gpu` is None on a CPU. Its keys, each of which holds an error's text if it could not be measured:
    ready_s (until the third decode step is done, so that recording CUDA graphs is included), static_ms and dynamic_ms
    (a token of `generate` over the static and the default cache), static_tokens_s_16 (tokens a second of 16 sequences
    over the static cache), launches (see `glowplug.bench.gpu.launches`), graphs (the report's `cuda_graphs`; None
    without glowplug), tokens_equal_eager (how many of the first 64 greedy tokens are eager's, up to the first that
    is not; in half precision rounding alone can change one).

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
        "gpu": None,
        "fallback": [],
        "error": None,
    }


def error_record(spec: Spec, error: str, measured: Record | None = None) -> Record:
    """The record of a measurement that failed, with what had been measured by then."""
    return {**empty_record(spec), **(measured or {}), "error": error}
