"""`glowplug starts`: compares the ways to start a model, and starts fleets of processes on one store."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from glowplug.bench.models import check_dtype, default_dtype, resolve_device
from glowplug.bench.presets import PRESETS
from glowplug.bench.results.environment import describe_environment, machine_line
from glowplug.bench.runner import check_writable
from glowplug.bench.starts import (
    DEFAULT_WAYS,
    Started,
    compilations,
    medians,
    model_folder,
    run_fleet,
    run_ways,
    write_starts,
)
from glowplug.bench.workers.start import WAYS, Start
from glowplug.cli.bench import read_names
from glowplug.cli.console import make_console, quiet_transformers
from glowplug.errors import UsageError
from glowplug.options import Options


def starts(
    model: Annotated[str, typer.Argument(help=f"A local folder, or a preset: {', '.join(PRESETS)}.")],
    depth: Annotated[int | None, typer.Option(help="Layers of a preset. Default: its own.")] = None,
    ways: Annotated[str, typer.Option(help=f"Some of {', '.join(WAYS[:-1])}.")] = ",".join(DEFAULT_WAYS),
    fleet: Annotated[int, typer.Option(help="If not 0: this many processes, one after another and all at once.")] = 0,
    experts: Annotated[str, typer.Option(help="auto, inline or opaque.")] = "auto",
    width: Annotated[str, typer.Option(help="Of a preset: tiny or full.")] = "tiny",
    all_experts: Annotated[
        bool, typer.Option("--all-experts", help="Give a preset as many experts a layer as the released model has.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Default: float32 on a CPU, bfloat16 on a GPU.")] = None,
    evict: Annotated[bool, typer.Option("--evict", help="Load the weights from disk, not the page cache.")] = False,
    rounds: Annotated[int, typer.Option(help="Repeat all starts this many times, and show medians.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all results here as they arrive.")] = None,
) -> None:
    """Start a model cold, warm, in the background and while its weights load, each in a fresh process."""
    quiet_transformers()
    Options(experts=experts)  # type: ignore[arg-type]
    chosen = tuple(read_names(ways))
    unknown = [name for name in chosen if name not in WAYS[:-1]]
    if unknown or not (chosen or fleet):
        wrong = f"unknown way {unknown[0]!r}" if unknown else "no way to start given"
        raise UsageError(f"{wrong}; --ways takes some of {', '.join(WAYS[:-1])}")
    if "warm" in chosen and "cold" not in chosen[: chosen.index("warm")]:
        raise UsageError("a warm start needs the store of a cold one before it: --ways cold,warm")
    if width not in ("tiny", "full"):
        raise UsageError(f"width must be tiny or full, not {width!r}")
    if fleet < 0:
        raise UsageError(f"--fleet must be 0 or more, not {fleet}")
    if rounds < 1:
        raise UsageError(f"--rounds must be 1 or more, not {rounds}")
    if json_path is not None:
        check_writable(json_path)
    resolve_device(device)
    dtype = dtype or default_dtype(device)
    check_dtype(dtype)
    console = make_console()
    environment = describe_environment(device)
    about = {
        "environment": environment,
        "model": model if model in PRESETS else Path(model).name,
        "depth": depth,
        "width": width,
        "all_experts": all_experts,
        "experts": experts,
        "device": device,
        "dtype": dtype,
        "evict": evict,
    }
    with tempfile.TemporaryDirectory(prefix="glowplug-model-") as place:
        with console.status(f"making {model}"):
            folder = model_folder(
                model,
                depth,
                width,  # type: ignore[arg-type]
                dtype,
                Path(place),
                all_experts=all_experts,
                device=device,
            )
        versions = f"{machine_line(environment)}; transformers {environment['transformers']}; {dtype}"
        console.print(versions, markup=False)
        start = Start(folder=folder, experts=experts, device=device, dtype=dtype, evict=evict)
        finished: list[Started] = []
        fleets: dict[str, Any] = {}
        with console.status("starting") as status:
            for _ in range(rounds):
                for started in run_ways(start, chosen):
                    finished.append(started)
                    status.update(f"{len(finished)} of {len(chosen) * rounds} starts")
                    console.print(_start_line(started), markup=False, soft_wrap=True)
                    if json_path is not None:
                        write_starts(json_path, about, finished, fleets)
        if finished:
            console.print()
            print_starts(console, medians(finished))
        for name, at_once in (("one after another", False), ("at once", True)) if fleet else ():
            with console.status(f"{fleet} processes {name}"):
                result = run_fleet(start, fleet, at_once=at_once)
            fleets[name] = [started.result | {"failed": started.error} for started in result]
            console.print(_fleet_line(name, result), markup=False)
    if json_path is not None:
        write_starts(json_path, about, finished, fleets)
    errors = [process["failed"] for processes in fleets.values() for process in processes]
    if any(error is not None for error in (*(started.error for started in finished), *errors)):
        raise typer.Exit(1)


def _start_line(started: Started) -> str:
    if started.error is not None:
        return f"{started.way}: {started.error}"
    ready = started.result.get("ready_s", started.result["load_s"])
    return f"{started.way}: ready after {ready:.2f} s"


def print_starts(console: Console, starts: list[Started]) -> None:
    """A table with one row for each start, and below it, as tables are narrow, what else happened."""
    table = Table()
    table.add_column("start", no_wrap=True)
    times = ("loading\ns", "first\ntoken\ns", "second\ntoken\ns", "ready\ns", "compiled\nafter\ns")
    for name in (*times, "largest\nrelative\nerror"):
        table.add_column(name, justify="right")
    for started in starts:
        result = started.result
        compiled_after = result.get("taken_over_s", result.get("second_token_s"))
        table.add_row(
            started.way,
            _seconds(result.get("load_s")),
            _seconds(result.get("first_token_s")),
            _seconds(result.get("second_token_s")),
            _seconds(result.get("ready_s", result.get("load_s"))),
            _seconds(compiled_after if started.way not in ("eager", "load") else None),
            f"{result['error']:.0e}" if result.get("error") is not None else "-",
        )
    console.print(table)
    for started in starts:
        if note := started.error or _note(started.result):
            console.print(f"{started.way}: {note}", markup=False, soft_wrap=True)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _note(result: dict[str, Any]) -> str:
    report = result.get("report")
    if not report:
        return f"error of {result['rounds_to']} itself, against float32" if "rounds_to" in result else ""
    notes = [f"{report['distinct_pieces']} of {report['pieces']} pieces distinct"]
    elsewhere = report.get("elsewhere")
    if elsewhere and elsewhere["reason"] is None and elsewhere["seconds"] is not None:
        hidden = f"{elsewhere['hidden_seconds']:.1f} s of it hidden"
        notes.append(f"built in another process in {elsewhere['seconds']:.1f} s, {hidden}")
    else:
        notes.append(f"{report['start']} start")
    if "tokens_equal" in result:
        notes.append(f"{result['steps']} tokens meanwhile, {_eagers(result)}")
    notes += [fallback["reason"] for fallback in report["fallbacks"]]
    return "; ".join(notes)


def _eagers(result: dict[str, Any]) -> str:
    if result["tokens_equal"]:
        return "all eager's"
    return f"NOT all eager's: {result['others']} of the last {result['compared']} differ"


def _fleet_line(name: str, fleet: list[Started]) -> str:
    times = sorted(started.result["second_token_s"] for started in fleet if started.error is None)
    failed = len(fleet) - len(times)
    stored, distinct = compilations(fleet)
    if not times:
        return f"{len(fleet)} processes {name}: all failed ({fleet[0].error})"
    return (
        f"{len(fleet)} processes {name}: {stored} pieces compiled, {distinct} distinct; ready after "
        f"{times[0]:.2f} to {times[-1]:.2f} s, median {times[len(times) // 2]:.2f} s"
        + (f"; {failed} failed" if failed else "")
    )
