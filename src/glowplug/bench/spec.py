"""What one measurement is asked for, and the record that comes back, as plain data that crosses processes as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from glowplug.bench.presets import Width

Record = dict[str, Any]
"""One measurement; `empty_record` lists its keys."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One measurement: one model at one depth under one strategy.

    Attributes:
        model: a preset's name or a local folder.
        depth: number of layers.
        strategy: a name in `STRATEGIES`.
        width: width of a preset.
        experts: glowplug's `experts` option; torch's strategies run a model as transformers ships it.
        compiler: glowplug's piece compiler; torch's strategies use Inductor.
        device: `"cpu"` or `"cuda"`.
        dtype: dtype of the weights.
        prefill: tokens of the prompt whose first two tokens are timed.
        steady_s: seconds that each steady-state measurement may take after its warm-up.
    """

    model: str
    depth: int
    strategy: str
    width: Width = "tiny"
    experts: str = "auto"
    compiler: str = "inductor"
    device: str = "cpu"
    dtype: str = "float32"
    prefill: int = 16
    steady_s: float = 10.0

    def to_json(self) -> str:
        """The specification as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """What `to_json` wrote."""
        return cls(**json.loads(text))


def empty_record(spec: Spec) -> Record:
    """A record with everything known before measuring, and None for what is measured.

    Keys, with units: model, depth, width, strategy, experts, compiler, device, dtype, torch (version), cold_start_s,
    phases (name -> s), pieces, distinct_pieces, steady_ms ({"decode": ms, "prefill128": ms}), peak_rss_mb and
    cuda_peak_mb (MiB), max_rel_err, fallback (reasons), error.
    """
    import torch

    return {
        "model": spec.model,
        "depth": spec.depth,
        "width": spec.width,
        "strategy": spec.strategy,
        "experts": spec.experts,
        "compiler": spec.compiler,
        "device": spec.device,
        "dtype": spec.dtype,
        "torch": torch.__version__,
        "cold_start_s": None,
        "phases": {},
        "pieces": None,
        "distinct_pieces": None,
        "steady_ms": {"decode": None, "prefill128": None},
        "peak_rss_mb": None,
        "cuda_peak_mb": None,
        "max_rel_err": None,
        "fallback": [],
        "error": None,
    }


def error_record(spec: Spec, error: str) -> Record:
    """The record of a measurement that failed."""
    return {**empty_record(spec), "error": error}
