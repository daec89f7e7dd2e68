"""`glowplug demo`: how a trained model starts under each strategy, what it wrote, and what to remember of it."""

from __future__ import annotations

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
    Step,
    lessons,
    order_steps,
    run_steps,
    start_steps,
)
from glowplug.bench.models import check_model
from glowplug.bench.results.environment import describe_environment, machine_line
from glowplug.bench.results.table import NONE, seconds
from glowplug.bench.starts import Started, run_ways
from glowplug.bench.workers.start import Start
from glowplug.checkpoints import CHECKPOINTS, find_checkpoint
from glowplug.cli.console import make_console, quiet_transformers
from glowplug.cli.starts import print_starts
from glowplug.compilers import get_compiler
from glowplug.compilers.base import StoringCompiler

WAYS = ("eager", "cold", "warm", "background")


def demo(
    everything: Annotated[
        bool, typer.Option("--all", help="Run torch-regional at full depth, too, and start in the background.")
    ] = False,
    compiler: Annotated[str, typer.Option(help="inductor, or eager: glowplug's pieces uncompiled.")] = "inductor",
) -> None:
    """Start a small trained model under each strategy, and once more from its store; then show how `ordered` fails."""
    quiet_transformers()
    stores = isinstance(get_compiler(compiler), StoringCompiler)
    for name in CHECKPOINTS:
        check_model(name)
    steps = start_steps(compiler, stores=stores, everything=everything)
    console = make_console()
    _introduce(console, steps, everything=everything)
    starts = _run(console, steps)
    console.print()
    _print_starts(console, starts)
    _print_texts(console, starts)
    ways = _ways(console) if stores and everything else []
    console.print(
        f"\n{ORDER} has experts for text and others for images. Text runs only half of them, so not in the order of "
        "their creation:",
        markup=False,
    )
    steps = order_steps()
    with console.status(f"{len(steps)} short runs at once"):
        order = list(run_steps(steps, at_once=True))
    _print_order(console, order)
    console.print()
    for sentence in lessons(starts, order):
        console.print(f"- {sentence}", style="bold", markup=False)
    if not all(outcome.equal for outcome in starts) or not all(way.right for way in ways):
        raise typer.Exit(1)


def _introduce(console: Console, steps: list[Step], *, everything: bool) -> None:
    duration = "some five minutes" if everything else "about two minutes"
    console.print(
        f"How long does a mixture-of-experts model take to start with torch.compile, and what does glowplug save? "
        f"{START}, a small trained model, continues {PROMPT!r} in {len(steps)} ways, each in a new process with empty "
        f"compiler caches. Then {ORDER} shows what can go wrong. It takes {duration} on two cores.\n",
        markup=False,
    )
    console.print(f"{machine_line(describe_environment())}\n", markup=False)


def _run(console: Console, steps: list[Step]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    with console.status("") as status:
        status.update(_progress(steps, 0))
        for outcome in run_steps(steps):
            outcomes.append(outcome)
            step = outcome.step
            line = f"  {len(outcomes)} of {len(steps)}  {step.name} ({step.about}): {_brief(outcome)}"
            console.print(line, markup=False, style="dim", soft_wrap=True)
            status.update(_progress(steps, len(outcomes)))
    return outcomes


def _progress(steps: list[Step], finished: int) -> str:
    left = steps[finished:]
    return f"{finished + 1} of {len(steps)}  {left[0].name}" if left else ""


def _brief(outcome: Outcome) -> str:
    if outcome.error is not None:
        return outcome.error.partition(":")[0]
    return f"first token after {seconds(outcome.result['first_token_s'])} s"


def _print_starts(console: Console, outcomes: list[Outcome]) -> None:
    """A table with one row for each strategy, and below it, as tables are narrow, what else happened."""
    table = Table()
    table.add_column("strategy", no_wrap=True)
    for name in ("layers\ntraced", "pieces\ndistinct", "first token\ns", "a token\nms"):
        table.add_column(name, justify="right")
    table.add_column("tokens equal\nto eager's")
    notes = []
    for outcome in outcomes:
        name, depth, result = outcome.step.name, outcome.step.generation.depth, outcome.result
        if outcome.error is not None:
            table.add_row(name, *[NONE] * 4, Text("failed", style="bold red"))
            notes.append(f"{name}: {outcome.error}")
            continue
        same = sum(a == b for a, b in zip(result["tokens"], result["expected"], strict=False))
        table.add_row(
            name if depth is None else f"{name}\nat {depth} layers",
            _share(result["traced_layers"], result["layers"]),
            _share(result["distinct_pieces"], result["pieces"]),
            seconds(result["first_token_s"]),
            f"{result['ms_per_token']:.1f}",
            f"all {same}" if outcome.equal else Text(f"{same} of {len(result['expected'])}", style="bold red"),
            style="bold" if name.startswith("stamped") else "" if depth is None else "dim",
        )
        notes += [f"{name}: {reason}" for reason in result["fallback"]]
        if depth is not None:
            notes.append(f"{name} ran on the first {depth} layers alone; --all runs all layers")
    console.print(table)
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)


def _share(some: int | None, every: int | None) -> str:
    return NONE if some is None else f"{some} of {every}"


def _ways(console: Console) -> list[Started]:
    """Start the first checkpoint without a store, with one, and in the background."""
    console.print(
        f"\n{START} started cold; warm, from the store that the cold start filled; and in the background, eager "
        "serving until another process has compiled it\n",
        markup=False,
    )
    starts: list[Started] = []
    with console.status("") as status:
        status.update(WAYS[0])
        for way in run_ways(Start(folder=str(find_checkpoint(START)), experts="opaque"), WAYS):
            starts.append(way)
            brief = way.error or f"second token after {seconds(way.result['second_token_s'])} s"
            console.print(f"  {way.way}: {brief}", markup=False, style="dim", soft_wrap=True)
            status.update(WAYS[min(len(starts), len(WAYS) - 1)])
    console.print()
    print_starts(console, starts)
    return starts


def _print_texts(console: Console, outcomes: list[Outcome]) -> None:
    """What eager wrote at full depth, and what others wrote in its place."""
    whole = [one for one in outcomes if one.error is None and one.step.generation.depth is None]
    if whole:
        equal = [outcome.step.name for outcome in whole if outcome.equal]
        console.print(f"\n{', '.join(equal) or 'eager'} wrote:", style="bold", markup=False)
        _print_text(console, whole[0].result["expected_text"])
    for outcome in outcomes:
        if outcome.error is None and not outcome.equal:
            console.print(f"{outcome.step.name} wrote:", style="bold red", markup=False)
            _print_text(console, outcome.result["text"])


def _print_text(console: Console, text: str) -> None:
    for line in f"{PROMPT}{text}".splitlines():
        console.print(f"  {line}", markup=False, soft_wrap=True)


def _print_order(console: Console, outcomes: list[Outcome]) -> None:
    console.print()
    for outcome in outcomes:
        name = outcome.step.name
        if outcome.error is not None:
            console.print(f"{name}: refused", style="bold yellow", markup=False)
            console.print(f"  {outcome.error}", markup=False, soft_wrap=True)
        else:
            verdict = "the text that eager writes" if outcome.equal else "garbage, and no error"
            console.print(f"{name}: {verdict}", style="bold green" if outcome.equal else "bold red", markup=False)
            _print_text(console, outcome.result["text"])
