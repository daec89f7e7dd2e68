"""Compares the ways to start a model: cold, warm from a store, in the background, and while the weights load; and
starts fleets of processes on one store. Each start has a fresh process with fresh compiler caches.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from glowplug.bench.models import check_dtype, check_model, find_folder
from glowplug.bench.presets import PRESETS, Width, build_model
from glowplug.bench.workers.isolate import Isolated, IsolatedError
from glowplug.bench.workers.start import Start
from glowplug.errors import UsageError

WORKER = "glowplug.bench.workers.start"
TIMEOUT_S = 1800.0
DEFAULT_WAYS = ("eager", "cold", "warm", "background", "load", "from_pretrained")


@dataclass(frozen=True)
class Started:
    """The outcome of one start.

    Attributes:
        way: a name in `WAYS`.
        result: what `workers.start.run` returned; empty if it failed.
        error: why it failed.
    """

    way: str
    result: dict[str, Any]
    error: str | None = None

    @property
    def right(self) -> bool:
        """Whether it succeeded and every compared token equals eager's."""
        return self.error is None and self.result.get("tokens_equal", True)


def model_folder(
    model: str,
    depth: int | None,
    width: Width,
    dtype: str,
    place: Path,
    *,
    all_experts: bool = False,
    device: str = "cpu",
) -> str:
    """The folder of a model; a preset is built and saved in `place`.

    Args:
        model: a preset, or a folder.
        depth: layers of a preset; None for its own.
        width: of a preset.
        dtype: the dtype of a preset's weights.
        place: an empty folder.
        all_experts: give a preset as many experts a layer as the released model has.
        device: where to make a preset's weights; a GPU is much faster.

    Raises:
        UsageError: no such model or dtype, or a depth or a number of experts for a folder.
    """
    if model not in PRESETS:
        check_model(model)
        if depth is not None or all_experts:
            raise UsageError("--depth and --all-experts are for presets; a folder's model has its own")
        return str(find_folder(model))
    weights = check_dtype(dtype)
    built = build_model(model, depth=depth, width=width, device=device, dtype=weights, all_experts=all_experts)
    built.save_pretrained(place)
    del built
    torch.cuda.empty_cache()  # does nothing unless the GPU was used
    return str(place)


def run_ways(start: Start, ways: tuple[str, ...]) -> Iterator[Started]:
    """Start a model in each way, one after the other. Each has a store of its own, but warm uses that of cold."""
    with tempfile.TemporaryDirectory(prefix="glowplug-starts-") as stores:
        for way in ways:
            store = Path(stores, "cold" if way == "warm" else way)
            yield _finish(way, _begin(replace(start, way=way), store))


def medians(starts: list[Started]) -> list[Started]:
    """One start for each way: medians of times, the largest error, the sums of compared tokens, and the rest from its
    last start. A way that failed once has failed."""
    summaries = []
    for way in dict.fromkeys(one.way for one in starts):
        same = [one for one in starts if one.way == way]
        failed = next((one for one in same if one.error is not None), None)
        if failed is not None:
            summaries.append(failed)
            continue
        result = dict(same[-1].result)
        for name in [name for name in result if name.endswith("_s")]:
            result[name] = statistics.median(one.result[name] for one in same)
        if "error" in result:
            result["error"] = max(one.result["error"] for one in same)
        if "tokens_equal" in result:
            result["tokens_equal"] = all(one.result["tokens_equal"] for one in same)
            for name in ("compared", "others"):
                result[name] = sum(one.result[name] for one in same)
        summaries.append(Started(way, result))
    return summaries


def run_fleet(start: Start, processes: int, *, at_once: bool) -> list[Started]:
    """Start a number of processes on one empty store, one after the other or all at once."""
    start = replace(start, way="fleet")
    with tempfile.TemporaryDirectory(prefix="glowplug-fleet-") as store:
        if not at_once:
            return [_finish("fleet", _begin(start, Path(store, "store"))) for _ in range(processes)]
        with ExitStack() as stack:
            begun = [stack.enter_context(closing(_begin(start, Path(store, "store")))) for _ in range(processes)]
            return [_finish("fleet", process) for process in begun]


def _begin(start: Start, store: Path) -> Isolated:
    return Isolated(WORKER, start.to_json(), timeout_s=TIMEOUT_S, extra={"GLOWPLUG_CACHE": str(store)})


def _finish(way: str, process: Isolated) -> Started:
    try:
        result = process.answer()
    except IsolatedError as exc:
        return Started(way, {}, str(exc))
    finally:
        process.close()
    return Started(way, result, result.pop("failed", None))


def compilations(fleet: list[Started]) -> tuple[int, int]:
    """How many pieces the processes of a fleet compiled together, and how many distinct ones there are."""
    reports = [started.result.get("report") or {} for started in fleet]
    compiled = sum(report.get("compiled_pieces", 0) for report in reports)
    return compiled, max((report.get("distinct_pieces", 0) for report in reports), default=0)


def write_starts(path: Path, about: dict[str, Any], started: list[Started], fleets: dict[str, Any]) -> None:
    """Write the results and `about` as JSON, without the places of the stores, which no longer exist."""
    rows = [{"way": one.way, "failed": one.error, **one.result} for one in started]
    for row in (*rows, *(process for fleet in fleets.values() for process in fleet)):
        store = (row.get("report") or {}).get("store") or {}
        store.pop("place", None)
    path.write_text(json.dumps({**about, "starts": rows, "fleets": fleets}, indent=2) + "\n")
