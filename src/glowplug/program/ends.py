"""Pieces that run seldom in a step, such as a model's first and last: their program serves with them uncompiled, a fork
or another process compiles them meanwhile, and they are swapped in between two sequences.

On two cores a piece takes two to three seconds to compile. One that runs once in a step of dozens of pieces saves less
in all the steps of those seconds than its compilation would delay the first.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.split import Piece, may_mutate
from glowplug.reasons import said
from glowplug.verify.slots import run_both

logger = logging.getLogger("glowplug")

_SHARE = 1 / 8
"""Largest share of a program's pieces that may start uncompiled, all of them together."""
_ENDS = 2
"""So many may at any depth, as long as others run more often: what they cost a step does not depend on its length."""
_RUNS = 4
"""Runs whose inputs are kept, to try the compiled piece on: those of the comparison with eager, mostly."""
_LARGEST = 2**20
"""Elements of the inputs kept, not counting weights: at most."""


def choose_ends(uses: Counter[Fingerprint], pieces: Mapping[Fingerprint, Piece]) -> set[Fingerprint]:
    """The pieces that may start uncompiled: those used least often, as long as all of them together are few.

    Args:
        uses: how often each distinct piece runs in a step.
        pieces: one of each.
    """
    left = max(sum(uses.values()) * _SHARE, _ENDS)
    chosen: set[Fingerprint] = set()
    for count in sorted(set(uses.values()))[:-1]:
        some = {found for found, often in uses.items() if often == count}
        left -= count * len(some)
        if left < 0:
            break
        chosen |= some
    return {found for found in chosen & pieces.keys() if not _writes(pieces[found])}


def _writes(piece: Piece) -> bool:
    """Whether a piece may write to its inputs, or to anything that it did not make: a trial would do so twice."""
    nodes = list(piece.gm.graph.nodes)
    given = {storage for node in nodes if node.op == "placeholder" for storage in _storages([node])}
    for node in nodes:
        if node.op in ("placeholder", "output") or not may_mutate(node):
            continue
        touched = _storages(node.all_input_nodes)
        if not touched or touched & given:
            return True
    return False


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    """The memory that values lie in; views of a tensor lie in its own."""
    values = [node.meta.get("example_value") for node in nodes]
    return {value.untyped_storage()._cdata for value in values if isinstance(value, Tensor)}


class Uncompiled:
    """An uncompiled piece that keeps the inputs of its first runs.

    Args:
        run: the piece.
    """

    def __init__(self, run: Callable[..., Sequence[Any]]) -> None:
        self.run = run
        self.seen: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Run the piece."""
        if len(self.seen) < _RUNS and sum(_size(value) for value in args) <= _LARGEST:
            self.seen.append(args)
        return self.run(*args)


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter) else 0


@dataclass(frozen=True)
class Delivered:
    """A piece that was compiled beside serving.

    Attributes:
        run: the compiled piece.
        ours: whether this process had it compiled.
    """

    run: Callable[..., Sequence[Any]]
    ours: bool


class Maker(Protocol):
    """Whoever compiles ends."""

    def collect(self, deadline: float | None) -> Mapping[Fingerprint, Delivered] | None:
        """What was compiled, once all of it was, or never will be; None while it is under way.

        Args:
            deadline: wait for it until then (`time.monotonic()`); None: don't wait.
        """
        ...


class Ends:
    """The pieces of one program that run uncompiled for now.

    Args:
        graphs: the uncompiled pieces.
        maker: compiles them.

    Attributes:
        runners: what runs in their place.
        ready: the compiled pieces, once they were delivered. A program takes them when a sequence begins.
        compiled: how many were compiled for this process.
        pending: whether they are still being compiled.
    """

    def __init__(self, graphs: Mapping[Fingerprint, Callable[..., Sequence[Any]]], maker: Maker) -> None:
        self.runners = {found: Uncompiled(run) for found, run in graphs.items()}
        self.maker = maker
        self.ready: dict[Fingerprint, Callable[..., Any]] = {}
        self.compiled = 0
        self.pending = True

    def poll(self, deadline: float | None = None) -> dict[Fingerprint, Callable[..., Any]]:
        """Take what has been compiled, once all of it has been; returns each piece that may run compiled from now on.

        Args:
            deadline: as for `Maker.collect`.
        """
        taken: dict[Fingerprint, Callable[..., Any]] = {}
        delivered = self.maker.collect(deadline) if self.pending else None
        if delivered is None:
            return taken
        for found, runner in self.runners.items():
            one = delivered.get(found)
            if one is None:
                logger.info("glowplug: piece %s stays uncompiled: it was not delivered", found.digest[:12])
                continue
            self.compiled += one.ours
            problem = _try(runner, one.run)
            if problem is not None:
                logger.warning("glowplug: piece %s stays uncompiled: %s", found.digest[:12], problem)
                continue
            taken[found] = one.run
        for runner in self.runners.values():
            runner.seen.clear()
        self.ready = taken
        self.pending = False
        return taken


def _try(runner: Uncompiled, compiled: Callable[..., Sequence[Any]]) -> str | None:
    """Run a compiled piece on the inputs that the uncompiled one had; why it must not be used, or None."""
    with torch.no_grad():
        for args in runner.seen:
            try:
                _, problem = run_both(runner.run, compiled, args)
            except Exception as exc:
                return f"it raised {said(exc)}"
            if problem is not None:
                return problem
    return None


def count_uses(prints: Iterable[Fingerprint | None]) -> Counter[Fingerprint]:
    """How often each piece runs, from the fingerprint of each step (None: an op)."""
    return Counter(found for found in prints if found is not None)
