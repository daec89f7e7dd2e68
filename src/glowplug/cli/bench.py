"""`glowplug bench`: measures strategies on a model, each in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glowplug.bench.presets import PRESETS
from glowplug.bench.results.environment import describe_environment, machine_line
from glowplug.bench.results.plot import check_plot, draw
from glowplug.bench.results.record import Record
from glowplug.bench.results.table import record_line, results_table
from glowplug.bench.runner import TIMEOUT_S, check_writable, make_grid, run_grid
from glowplug.bench.spec import Spec
from glowplug.bench.strategies import DEFAULT_STRATEGIES, GPU_STRATEGIES, STRATEGIES
from glowplug.cli.console import make_console, quiet_transformers
from glowplug.errors import UsageError


def bench(
    model: Annotated[str, typer.Argument(help=f"A local folder, or a preset: {', '.join(PRESETS)}.")],
    depth: Annotated[str | None, typer.Option(help="Layers, such as 12,36. Default: the model's own.")] = None,
    strategies: Annotated[
        str | None,
        typer.Option(
            help=f"Some of {', '.join(STRATEGIES)}. Default: {','.join(DEFAULT_STRATEGIES)}; "
            f"on a GPU {','.join(GPU_STRATEGIES)}."
        ),
    ] = None,
    experts: Annotated[str, typer.Option(help="auto, inline or opaque; for glowplug's strategies.")] = "auto",
    width: Annotated[str, typer.Option(help="tiny, or full: a preset's real sizes, with all or few experts.")] = "tiny",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Default: float32 on a CPU, bfloat16 on a GPU.")] = None,
    compiler: Annotated[str, typer.Option(help="inductor, or eager: glowplug's pieces uncompiled.")] = "inductor",
    timeout: Annotated[float, typer.Option(help="Time limit of one measurement, in seconds.")] = TIMEOUT_S,
    rounds: Annotated[
        int,
        typer.Option(help="If not 0: steady states in this many rounds of turns, all strategies in memory."),
    ] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all results here.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Draw cold start against depth here.")] = None,
) -> None:
    """Measure how fast a model starts: each strategy at each depth, in a fresh process with fresh compiler caches."""
    quiet_transformers()
    default = GPU_STRATEGIES if device == "cuda" else DEFAULT_STRATEGIES
    specs = make_grid(
        model,
        depths=_depths(depth),
        strategies=list(default) if strategies is None else read_names(strategies),
        experts=experts,
        width=width,  # type: ignore[arg-type]
        device=device,
        dtype=dtype,
        compiler=compiler,
    )
    if not timeout > 0:
        raise UsageError(f"--timeout must be more than 0 s, not {timeout:g}")
    if rounds < 0:
        raise UsageError(f"--rounds must be 0 or more, not {rounds}")
    if plot_path is not None:
        check_plot(plot_path)
    for path in (json_path, plot_path):
        if path is not None:
            check_writable(path)
    environment = describe_environment(device)
    console = make_console()
    console.print(f"{machine_line(environment)}; transformers {environment['transformers']}", markup=False)
    with console.status("") as status:

        def on_start(spec: Spec) -> None:
            status.update(f"{spec.model} depth {spec.depth}: {spec.strategy}")

        def on_record(record: Record) -> None:
            console.print(record_line(record), markup=False, soft_wrap=True)

        records = run_grid(
            specs,
            environment=environment,
            json_path=json_path,
            timeout_s=timeout,
            rounds=rounds,
            on_start=on_start,
            on_record=on_record,
        )
    console.print()
    console.print(results_table(records))
    failed = all(record["error"] is not None for record in records)
    if plot_path is not None and not failed:
        draw(records, environment, plot_path)
    if failed:
        raise typer.Exit(1)


def read_names(text: str) -> list[str]:
    """The distinct names in a text with commas between them."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _depths(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        depths = list(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        depths = []
    if not depths:
        raise UsageError(f"--depth takes whole numbers with commas between them, such as 12,36; not {text!r}")
    return depths
