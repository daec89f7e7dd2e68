"""What `glowplug demo` runs: the checkpoints of the package under each strategy, each run in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

from glowplug.bench.results.table import seconds
from glowplug.bench.workers.generation import Generation
from glowplug.bench.workers.isolate import Isolated, IsolatedError
from glowplug.checkpoints import CHECKPOINTS, find_checkpoint

PROMPT = "The with statement"
START, ORDER = CHECKPOINTS
"""The checkpoint that shows how fast each strategy starts, and the one whose layers don't run in order of creation."""
STRATEGIES = {
    "eager": "nothing is compiled",
    "torch-regional": "torch compiles each layer by itself",
    "baked": "layers are names in the graph",
    "ordered": "layers are taken in the order of their creation",
    "hoisted": "layers are inputs of the graph",
    "stamped": "as hoisted, but only a template is traced: glowplug's default",
}
AGAIN = "stamped again"
SHORT = 2
"""Layers of the run of `torch-regional`, which takes longest, unless all is asked for."""
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Step:
    """One run of the demo.

    Attributes:
        name: its name in lines and tables.
        about: what it does, in a few words.
        generation: what it generates, and how.
        shares_store: whether it uses the store that all such steps share, not an empty one.
    """

    name: str
    about: str
    generation: Generation
    shares_store: bool = False


@dataclass(frozen=True)
class Outcome:
    """The outcome of one step.

    Attributes:
        step: what ran.
        result: what `workers.generation.generate` returned; empty if it failed.
        error: why it failed, or None.
    """

    step: Step
    result: dict[str, Any]
    error: str | None

    @property
    def equal(self) -> bool:
        """Whether the tokens equal eager's."""
        return self.error is None and self.result["tokens"] == self.result["expected"]


def start_steps(compiler: str, *, stores: bool, everything: bool) -> list[Step]:
    """One step a strategy on the first checkpoint.

    Args:
        compiler: glowplug's piece compiler.
        stores: whether its pieces can be stored; then the last step starts from the store that `stamped` filled.
        everything: run `torch-regional`, too, at full depth.
    """
    folder = str(find_checkpoint(START))
    steps = []
    for name, about in STRATEGIES.items():
        last = stores and name == "stamped"
        depth = SHORT if name == "torch-regional" and not everything else None
        generation = Generation(
            folder=folder, strategy=name, prompt=PROMPT, compiler=compiler, depth=depth, settle=last
        )
        steps.append(Step(name, about, generation, shares_store=last))
    if stores:
        generation = Generation(folder=folder, strategy="stamped", prompt=PROMPT, compiler=compiler)
        steps.append(Step(AGAIN, "in a new process, from the store", generation, shares_store=True))
    return steps


def order_steps() -> list[Step]:
    """On the second checkpoint: `ordered` unguarded, `ordered` as it is, `hoisted`; uncompiled, which is faster."""
    steps = []
    for strategy, check in (("ordered", False), ("ordered", True), ("hoisted", True)):
        generation = Generation(
            folder=str(find_checkpoint(ORDER)), strategy=strategy, prompt=PROMPT, compiler="eager", check_order=check
        )
        steps.append(Step(strategy if check else f"{strategy}, checks off", STRATEGIES[strategy], generation))
    return steps


def run_steps(steps: list[Step], *, at_once: bool = False) -> Iterator[Outcome]:
    """Run each in a process of its own with empty compiler caches, in turn or all at once; yield outcomes in order.

    The processes are forks of one that has imported torch and transformers, which would take longer than most runs.
    """
    with tempfile.TemporaryDirectory(prefix="glowplug-demo-") as store:
        if not at_once:
            for step in steps:
                with closing(_begin(step, store)) as process:
                    yield _outcome(step, process)
            return
        with ExitStack() as stack:
            begun = [(step, stack.enter_context(closing(_begin(step, store)))) for step in steps]
            for step, process in begun:
                yield _outcome(step, process)


def _begin(step: Step, store: str) -> Isolated:
    extra = {"GLOWPLUG_CACHE": store} if step.shares_store else None
    module = "glowplug.bench.workers.generation"
    return Isolated(module, step.generation.to_json(), timeout_s=TIMEOUT_S, extra=extra, forked=True)


def _outcome(step: Step, process: Isolated) -> Outcome:
    try:
        result = process.answer()
    except IsolatedError as exc:
        result = {"error": str(exc)}
    error = result.pop("error")
    return Outcome(step, result, error)


def lessons(starts: list[Outcome], order: list[Outcome]) -> list[str]:
    """What to remember of a demo: one sentence each on the first start, on the next one, and on what was written."""
    results = {outcome.step.name: outcome.result for outcome in starts if outcome.error is None}
    sentences = []
    if "stamped" in results and "baked" in results:
        stamped, baked = results["stamped"], results["baked"]
        sentences.append(
            f"glowplug's default, stamped, wrote its first token after {seconds(stamped['first_token_s'])} s, and "
            f"baked after {seconds(baked['first_token_s'])} s: of {stamped['layers']} layers it traced "
            f"{stamped['traced_layers']}, and of {stamped['pieces']} pieces it compiled {stamped['distinct_pieces']}."
        )
    if AGAIN in results:
        again = seconds(results[AGAIN]["first_token_s"])
        sentences.append(f"Started again, it wrote its first token after {again} s, from its store.")
    if not all(outcome.equal for outcome in starts):
        wrong = ", ".join(outcome.step.name for outcome in starts if not outcome.equal)
        sentences.append(f"Something is wrong here: {wrong} failed, or wrote other tokens than eager.")
    elif order and order[0].error is None and not order[0].equal and order[-1].equal:
        sentences.append(
            "All of them wrote exactly what eager writes; but layers taken in the order of their creation, unchecked, "
            f"wrote garbage on {ORDER} without an error."
        )
    else:
        sentences.append("All of them wrote exactly what eager writes.")
    return sentences
