"""The specification of one measurement: plain data that crosses processes as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from glowplug.bench.presets import Width


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
        steady_s: the most seconds that each steady-state measurement may take after its warm-up.
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
