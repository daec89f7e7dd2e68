"""Runs a grid of measurements, each in a process of its own, and saves every record as soon as it arrives."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from glowplug.bench.models import check_dtype, check_model, default_dtype, resolve_device, true_depth
from glowplug.bench.presets import Width
from glowplug.bench.results.record import Record, error_record
from glowplug.bench.spec import Spec
from glowplug.bench.strategies import get_strategy
from glowplug.bench.workers.isolate import Isolated, IsolatedError, run_isolated
from glowplug.bench.workers.turns import FOLDER, Turner, take_turns
from glowplug.errors import UsageError
from glowplug.options import Options

TIMEOUT_S = 1800.0
WORKER = "glowplug.bench.workers.measurement"


def make_grid(
    model: str,
    *,
    depths: Sequence[int] | None = None,
    strategies: Sequence[str],
    experts: str = "auto",
    width: Width = "tiny",
    device: str = "cpu",
    dtype: str | None = None,
    compiler: str = "inductor",
) -> list[Spec]:
    """The measurements of every strategy at every depth, in that order of depths.

    Args:
        model: a preset's name or a local folder.
        depths: numbers of layers; None for the model's own.
        strategies: names in `STRATEGIES`.
        experts, compiler: options of `glowplug.compile`, for glowplug's strategies.
        width: of a preset.
        device: `"cpu"` or `"cuda"`.
        dtype: of the weights; None for `default_dtype(device)`.

    Raises:
        UsageError: an argument is wrong, as far as can be seen before a model is built.
    """
    on_gpu = [name for name in strategies if get_strategy(name).auto_compile]
    if not strategies:
        raise UsageError("no strategy given")
    if resolve_device(device).type == "cpu" and on_gpu:
        raise UsageError(f"{on_gpu[0]} needs --device cuda: transformers compiles nothing by itself on a CPU")
    dtype = dtype or default_dtype(device)
    check_dtype(dtype)
    if width not in ("tiny", "full"):
        raise UsageError(f"width must be tiny or full, not {width!r}")
    Options(experts=experts, compiler=compiler)  # type: ignore[arg-type]
    check_model(model, depths or ())
    chosen = list(depths) if depths else [true_depth(model)]
    return [
        Spec(
            model=model,
            depth=depth,
            strategy=strategy,
            width=width,
            experts=experts,
            compiler=compiler,
            device=device,
            dtype=dtype,
        )
        for depth in chosen
        for strategy in strategies
    ]


def run_grid(
    specs: Sequence[Spec],
    *,
    environment: dict[str, Any],
    json_path: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    rounds: int = 0,
    on_start: Callable[[Spec], None] = lambda spec: None,
    on_record: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Measure each specification in a fresh process with fresh compiler caches.

    Args:
        specs: what to measure, in order.
        environment: goes into the file.
        json_path: the results file, rewritten whole after each record.
        timeout_s: seconds that one measurement may take.
        rounds: if not 0, measure steady states in this many rounds of turns, with all strategies in memory at once.
        on_start, on_record: called before and after each measurement.

    Returns:
        A record a specification; failures are records too.
    """
    records: list[Record] = []

    def keep(record: Record) -> None:
        records.append(record)
        if json_path is not None:
            write_results(json_path, environment, records)
        on_record(record)

    if not rounds:
        for spec in specs:
            on_start(spec)
            keep(_run_one(spec, timeout_s))
        return records
    for depth in dict.fromkeys(spec.depth for spec in specs):
        _run_in_turns([spec for spec in specs if spec.depth == depth], timeout_s, rounds, on_start, keep)
    return records


def _run_in_turns(
    specs: Sequence[Spec],
    timeout_s: float,
    rounds: int,
    on_start: Callable[[Spec], None],
    keep: Callable[[Record], None],
) -> None:
    """Cold starts one after the other, then all steady states in turns."""
    turners: list[Turner] = []
    try:
        for spec in specs:
            on_start(spec)
            process = Isolated(WORKER, spec.to_json(), timeout_s=timeout_s, extra={FOLDER: "{}"})
            turners.append(Turner(process))
            turners[-1].wait_until_ready()
        take_turns(turners, rounds, timeout_s)
        for spec, turner in zip(specs, turners, strict=True):
            try:
                keep(turner.process.answer())
            except IsolatedError as exc:
                keep(error_record(spec, str(exc), exc.answer))
    finally:
        for turner in turners:
            turner.process.close()


def _run_one(spec: Spec, timeout_s: float) -> Record:
    try:
        return run_isolated(WORKER, spec.to_json(), timeout_s=timeout_s)
    except IsolatedError as exc:
        return error_record(spec, str(exc), exc.answer)


def check_writable(path: Path) -> None:
    """Raise `UsageError` if a file can't be written there. An existing file keeps its content."""
    existed = path.exists()
    try:
        with path.open("a"):
            pass
    except OSError as exc:
        raise UsageError(f"can't write {path}: {exc.strerror or exc}") from exc
    if not existed:
        path.unlink()


def write_results(path: Path, environment: dict[str, Any], records: Sequence[Record]) -> None:
    """Write the results file atomically."""
    text = json.dumps({"environment": environment, "results": list(records)}, indent=2)
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n")
    os.replace(part, path)
