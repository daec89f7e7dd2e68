"""What `glowplug demo` runs: the shipped checkpoints under each strategy, each generation in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glowplug.bench.models import check_model
from glowplug.bench.strategies import DEFAULT_STRATEGIES
from glowplug.bench.workers.generation import Generation
from glowplug.bench.workers.isolate import IsolatedError, run_isolated
from glowplug.errors import UsageError

PROMPT = "The with statement"
START, ORDER = "tiny-gpt-oss", "tiny-ernie-vl"
"""The checkpoint that shows how fast each strategy starts, and the one whose layers don't run in order of creation."""
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Outcome:
    """The outcome of one generation.

    Attributes:
        generation: its specification.
        result: what `workers.generation.generate` returned; empty if it failed.
        error: why it failed, or None.
    """

    generation: Generation
    result: dict[str, Any]
    error: str | None

    @property
    def equal(self) -> bool:
        """Whether the tokens equal eager's."""
        return self.error is None and self.result["tokens"] == self.result["expected"]


def find_models(folder: Path | None) -> Path:
    """The folder with both checkpoints: `folder`, or else `models/` of the repository or of the working directory.

    Raises:
        UsageError: a checkpoint is not there.
    """
    places = [folder] if folder is not None else [Path(__file__).parents[3] / "models", Path("models")]
    for place in places:
        if all((place / name / "config.json").is_file() for name in (START, ORDER)):
            for name in (START, ORDER):
                check_model(str(place / name))
            return place
    where = str(folder) if folder is not None else "models/ of the repository, nor in ./models"
    raise UsageError(f"no {START} and {ORDER} in {where}; run from a clone of the repository, or give --models DIR")


def start_generations(models: Path, compiler: str) -> list[Generation]:
    """One generation a strategy on the first checkpoint."""
    return [
        Generation(folder=str(models / START), strategy=strategy, prompt=PROMPT, compiler=compiler)
        for strategy in DEFAULT_STRATEGIES
    ]


def order_generations(models: Path) -> list[Generation]:
    """On the second checkpoint: `ordered` unguarded, `ordered` as it is, `hoisted`; uncompiled, which is faster."""
    folder = str(models / ORDER)
    return [
        Generation(folder=folder, strategy=strategy, prompt=PROMPT, compiler="eager", check_order=check)
        for strategy, check in (("ordered", False), ("ordered", True), ("hoisted", True))
    ]


def run_generations(generations: list[Generation]) -> Iterator[Outcome]:
    """Run each in a fresh process with fresh compiler caches, and yield each outcome as it arrives."""
    for generation in generations:
        try:
            result = run_isolated("glowplug.bench.workers.generation", generation.to_json(), timeout_s=TIMEOUT_S)
        except IsolatedError as exc:
            result = {"error": str(exc)}
        error = result.pop("error")
        yield Outcome(generation, result, error)
