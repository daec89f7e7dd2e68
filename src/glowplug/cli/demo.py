"""`glowplug demo`: all strategies and ways to start on the shipped checkpoints, with the text they write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from glowplug.bench.demo import (
    ORDER,
    PROMPT,
    START,
    Outcome,
    find_models,
    order_generations,
    run_generations,
    start_generations,
)
from glowplug.bench.results.environment import describe_environment, machine_line
from glowplug.bench.results.table import NONE, seconds
from glowplug.bench.starts import Started, run_ways
from glowplug.bench.workers.generation import Generation
from glowplug.bench.workers.start import Start
from glowplug.cli.console import make_console, quiet_transformers
from glowplug.cli.starts import starts_table
from glowplug.compilers import get_compiler
from glowplug.compilers.base import StoringCompiler

WAYS = ("eager", "cold", "warm", "background")


def demo(
    models: Annotated[Path | None, typer.Option(help=f"Folder with {START} and {ORDER}.")] = None,
    compiler: Annotated[str, typer.Option(help="inductor, or eager: glowplug's pieces uncompiled.")] = "inductor",
) -> None:
    """Start a small trained model under each strategy and in each way; then show how `ordered` fails."""
    quiet_transformers()
    stores = isinstance(get_compiler(compiler), StoringCompiler)
    folder = find_models(models)
    console = make_console()
    console.print(machine_line(describe_environment()), markup=False)
    console.print(f"{START} continues {PROMPT!r}; a fresh process and fresh compiler caches each time\n", markup=False)
    outcomes = _run(console, start_generations(folder, compiler))
    console.print()
    console.print(_start_table(outcomes))
    console.print(f"{START} is too short to stamp: here `stamped` traces every layer, as `hoisted` does.", markup=False)
    _print_texts(console, outcomes)
    ways = _ways(console, folder) if stores else []
    console.print(
        f"\n{ORDER} creates text and vision experts, and text runs only half of them, "
        "so they do not run in the order of creation\n",
        markup=False,
    )
    _print_order(console, _run(console, order_generations(folder)))
    if not all(outcome.equal for outcome in outcomes) or not all(way.right for way in ways):
        raise typer.Exit(1)


def _run(console: Console, generations: list[Generation]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    with console.status("") as status:
        status.update(_progress(generations, 0))
        for outcome in run_generations(generations):
            outcomes.append(outcome)
            console.print(
                f"  {_name(outcome.generation)}: {_brief(outcome)}", markup=False, style="dim", soft_wrap=True
            )
            status.update(_progress(generations, len(outcomes)))
    return outcomes


def _ways(console: Console, models: Path) -> list[Started]:
    """Start the first checkpoint without a store, with one, and in the background."""
    console.print(
        f"\n{START} started cold; warm, from the store that the cold start filled; and in the background, eager "
        "serving until another process has compiled it\n",
        markup=False,
    )
    starts: list[Started] = []
    with console.status("") as status:
        status.update(WAYS[0])
        for way in run_ways(Start(folder=str(models / START), experts="opaque"), WAYS):
            starts.append(way)
            brief = way.error or f"second token after {seconds(way.result['second_token_s'])} s"
            console.print(f"  {way.way}: {brief}", markup=False, style="dim", soft_wrap=True)
            status.update(WAYS[min(len(starts), len(WAYS) - 1)])
    console.print()
    console.print(starts_table(starts))
    return starts


def _progress(generations: list[Generation], finished: int) -> str:
    left = generations[finished:]
    return f"{_name(left[0])} ({finished + 1} of {len(generations)})" if left else ""


def _name(generation: Generation) -> str:
    return generation.strategy if generation.check_order else f"{generation.strategy}, checks off"


def _brief(outcome: Outcome) -> str:
    if outcome.error is not None:
        return outcome.error.partition(":")[0]
    return f"first token after {seconds(outcome.result['first_token_s'])} s"


def _start_table(outcomes: list[Outcome]) -> Table:
    table = Table()
    table.add_column("strategy")
    table.add_column("first token\ns", justify="right")
    table.add_column("distinct pieces\nof all", justify="right")
    table.add_column("a token\nms", justify="right")
    table.add_column("tokens equal\nto eager's")
    notes = any(outcome.error is not None or outcome.result["fallback"] for outcome in outcomes)
    if notes:
        table.add_column("note", overflow="fold", max_width=50)
    for outcome in outcomes:
        result = outcome.result
        if outcome.error is not None:
            table.add_row(outcome.generation.strategy, *[NONE] * 4, Text(f"failed: {outcome.error}"))
            continue
        pieces = NONE if result["pieces"] is None else f"{result['distinct_pieces']} of {result['pieces']}"
        same = sum(a == b for a, b in zip(result["tokens"], result["expected"], strict=False))
        cells: list[str | Text] = [
            outcome.generation.strategy,
            seconds(result["first_token_s"]),
            pieces,
            f"{result['ms_per_token']:.2f}",
            f"all {same}" if outcome.equal else Text(f"{same} of {len(result['expected'])}", style="bold red"),
        ]
        table.add_row(*cells, *([Text("; ".join(result["fallback"]))] if notes else []))
    return table


def _print_texts(console: Console, outcomes: list[Outcome]) -> None:
    succeeded = [outcome for outcome in outcomes if outcome.error is None]
    if not succeeded:
        return
    equal = [outcome.generation.strategy for outcome in succeeded if outcome.equal]
    console.print(f"{', '.join(equal) or 'eager'} wrote:", style="bold", markup=False)
    _print_text(console, succeeded[0].result["expected_text"])
    for outcome in succeeded:
        if not outcome.equal:
            console.print(f"{outcome.generation.strategy} wrote:", style="bold red", markup=False)
            _print_text(console, outcome.result["text"])


def _print_text(console: Console, text: str) -> None:
    for line in f"{PROMPT}{text}".splitlines():
        console.print(f"  {line}", markup=False, soft_wrap=True)


def _print_order(console: Console, outcomes: list[Outcome]) -> None:
    console.print()
    for outcome in outcomes:
        name = _name(outcome.generation)
        if outcome.error is not None:
            console.print(f"{name}: refused", style="bold yellow", markup=False)
            console.print(f"  {outcome.error}", markup=False, soft_wrap=True)
        else:
            verdict = "eager's text" if outcome.equal else "garbage, and no error"
            console.print(f"{name}: {verdict}", style="bold green" if outcome.equal else "bold red", markup=False)
            _print_text(console, outcome.result["text"])
