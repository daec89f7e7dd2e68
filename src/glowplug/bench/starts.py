"""The ways to start a model, compared: cold, warm from a store, in the background, behind the weights; and fleets of
processes on one store. Each start in a fresh process with fresh compiler caches.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glowplug.bench.isolate import Isolated, IsolatedError
from glowplug.bench.models import check_dtype, check_model
from glowplug.bench.presets import PRESETS, Width, build_model
from glowplug.bench.start_worker import Start
from glowplug.errors import UsageError

WORKER = "glowplug.bench.start_worker"
TIMEOUT_S = 1800.0
DEFAULT_WAYS = ("eager", "cold", "warm", "background", "load", "from_pretrained")


@dataclass(frozen=True)
class Started:
    """One start, done.

    Attributes:
        way: how.
        result: what `start_worker.run` returned; empty when it failed.
        error: why it failed.
    """

    way: str
    result: dict[str, Any]
    error: str | None = None

    @property
    def right(self) -> bool:
        """Whether it went well, and every token that was compared is eager's."""
        return self.error is None and self.result.get("tokens_equal", True)


def model_folder(
    model: str, depth: int | None, width: Width, dtype: str, place: Path, *, all_experts: bool = False
) -> str:
    """A folder with the model: itself, or a preset's, built and saved in `place`.

    Args:
        model: a preset, or a folder.
        depth: layers of a preset; None for its own.
        width: of a preset.
        dtype: in which a preset's weights are saved.
        place: an empty folder.
        all_experts: as many experts a layer of a preset as were released.

    Raises:
        UsageError: no such model or dtype, or a depth or a number of experts for a folder.
    """
    if model not in PRESETS:
        check_model(model)
        if depth is not None or all_experts:
            raise UsageError("--depth and --all-experts are for presets; a folder's model has its own")
        return model
    weights = check_dtype(dtype)
    built = build_model(model, depth=depth, width=width, device="cpu", dtype=weights, all_experts=all_experts)
    built.save_pretrained(place)
    return str(place)


def run_ways(start: Start, ways: tuple[str, ...]) -> Iterator[Started]:
    """Start a model in each way, one after the other. Each has a store of its own; but warm has that of cold."""
    with tempfile.TemporaryDirectory(prefix="glowplug-starts-") as stores:
        for way in ways:
            store = Path(stores, "cold" if way == "warm" else way)
            yield _finish(way, _begin(replace(start, way=way), store))


def medians(starts: list[Started]) -> list[Started]:
    """One start for each way: the median of each of its times, the largest error, all tokens that were compared, and
    otherwise its last start that went well. A way that failed once has failed."""
    found = []
    for way in dict.fromkeys(one.way for one in starts):
        same = [one for one in starts if one.way == way]
        failed = next((one for one in same if one.error is not None), None)
        if failed is not None:
            found.append(failed)
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
        found.append(Started(way, result))
    return found


def run_fleet(start: Start, processes: int, *, at_once: bool) -> list[Started]:
    """Start so many processes on one empty store, one after the other or all at once."""
    start = replace(start, way="fleet")
    with tempfile.TemporaryDirectory(prefix="glowplug-fleet-") as store:
        if not at_once:
            return [_finish("fleet", _begin(start, Path(store, "store"))) for _ in range(processes)]
        begun = [_begin(start, Path(store, "store")) for _ in range(processes)]
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
    """Pieces that all processes of a fleet compiled together, and how many distinct ones there are."""
    reports = [started.result.get("report") or {} for started in fleet]
    compiled = sum(report.get("compiled_pieces", 0) for report in reports)
    return compiled, max((report.get("distinct_pieces", 0) for report in reports), default=0)


def write_starts(path: Path, about: dict[str, Any], started: list[Started], fleets: dict[str, Any]) -> None:
    """Write what was measured: `about`, and everything else but where the stores were, as they are gone."""
    rows = [{"way": one.way, "failed": one.error, **one.result} for one in started]
    for row in (*rows, *(process for fleet in fleets.values() for process in fleet)):
        store = (row.get("report") or {}).get("store") or {}
        store.pop("place", None)
    path.write_text(json.dumps({**about, "starts": rows, "fleets": fleets}, indent=2) + "\n")
