"""`glowplug sweep`: tries every MoE family of transformers at tiny widths and prints one row for each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from glowplug.bench.results.environment import describe_environment, machine_line
from glowplug.bench.runner import check_writable
from glowplug.bench.sweep import COLUMNS, Row, markdown, sweep
from glowplug.cli.bench import read_names
from glowplug.cli.console import make_console, quiet_transformers
from glowplug.errors import UsageError
from glowplug.options import Options


def sweep_command(
    families: Annotated[str | None, typer.Option(help="Model types, such as gpt_oss,qwen3_next. Default: all.")] = None,
    depth: Annotated[int, typer.Option(help="Layers of each.")] = 24,
    experts: Annotated[str, typer.Option(help="auto, inline or opaque.")] = "auto",
    timeout: Annotated[float, typer.Option(help="Time limit of one family, in seconds.")] = 300.0,
    markdown_path: Annotated[Path | None, typer.Option("--markdown", help="Write the table here.")] = None,
) -> None:
    """Try every MoE family of transformers: is it stamped, with how many pieces, and equal to eager?"""
    quiet_transformers()
    Options(experts=experts)  # type: ignore[arg-type]
    if not timeout > 0:
        raise UsageError(f"--timeout must be more than 0 s, not {timeout:g}")
    if markdown_path is not None:
        check_writable(markdown_path)
    names = read_names(families) if families is not None else []
    if families is not None and not names:
        raise UsageError("--families names none; leave it out for all")
    found = sweep(names, depth, experts, timeout)
    console = make_console()
    environment = describe_environment("cpu")
    versions = f"transformers {environment['transformers']}, torch {environment['torch']}"
    console.print(f"{machine_line(environment)}; transformers {environment['transformers']}", markup=False)
    rows: list[Row] = []
    with console.status("") as status:
        status.update("starting")
        for row in found:
            rows.append(row)
            status.update(f"{len(rows)} families; last {row.family}")
            console.print(f"  {row.family}: {_brief(row)}", markup=False, style="dim", soft_wrap=True)
    console.print(_table(rows))
    if markdown_path is not None:
        markdown_path.write_text(markdown(rows, versions))


def _brief(row: Row) -> str:
    error = "" if row.error is None else f", error {row.error:.0e}"
    return f"{row.strategy or 'not run'}{error}"


def _table(rows: list[Row]) -> Table:
    table = Table()
    for name in COLUMNS:
        words = name in ("family", "runs", "why not stamped")
        table.add_column(name, justify="left" if words else "right", overflow="fold", max_width=70)
    for row in rows:
        table.add_row(*map(Text, row.cells()))
    return table
