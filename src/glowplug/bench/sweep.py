"""One family of the sweep in a process of its own: `python -m glowplug.bench.sweep '<json case>'`.
The last line of its output is the row as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

import glowplug
from glowplug.bench.families import build_family, depth_as_released, families, released_ropes
from glowplug.bench.models import one_line
from glowplug.bench.stepping import Sequence, Text, relative_error
from glowplug.bench.workers.isolate import IsolatedError, run_isolated, run_worker
from glowplug.errors import UsageError
from glowplug.frontends.hf.caches import new_cache
from glowplug.frontends.hf.discover import stack_of

_BAR = "\\|"
"""A bar inside a cell of a Markdown table."""
_STEPS = (9, 1, 3)
"""Tokens of each step, one after the other on one cache."""
COLUMNS = ("family", "runs", "kinds", "template", "pieces", "distinct", "error", "why not stamped")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family to try.

    Attributes:
        family: its model type.
        depth: layers.
        experts: as in `glowplug.compile`.
    """

    family: str
    depth: int
    experts: str = "auto"


@dataclass(kw_only=True)
class Row:
    """The result for one family.

    Attributes:
        family: its model type.
        depth: layers.
        strategy: `"stamped"`, `"hoisted"`, `"eager"`, or `""` when nothing ran.
        kinds: kinds of layers.
        template: number of layers that were traced; 0 if all were.
        pieces: pieces of the program.
        distinct: its distinct pieces.
        error: largest relative error of the logits against eager; None if nothing ran.
        reasons: why the model was not stamped, or failed.
    """

    family: str
    depth: int
    strategy: str = ""
    kinds: int = 0
    template: int = 0
    pieces: int = 0
    distinct: int = 0
    error: float | None = None
    reasons: list[str] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        """The cells of the row, in the order of `COLUMNS`."""
        error = "" if self.error is None else f"{self.error:.0e}"
        counts = (self.kinds, self.template or "all", self.pieces, self.distinct)
        return (self.family, self.strategy or "-", *map(str, counts), error, "; ".join(self.reasons))


def sweep(names: list[str], depth: int, experts: str, timeout_s: float) -> Iterator[Row]:
    """Try families, each in a process of its own; a family that fails gives a row with its reason.

    Args:
        names: model types, or rows of `released_ropes`; if empty, all families and those rows.
        depth: layers of each; see `depth_as_released`.
        experts: as in `glowplug.compile`.
        timeout_s: seconds for each.

    Raises:
        UsageError: an unknown family, or a depth below 1.
    """
    known = [*families(), *released_ropes()]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"no MoE family {', '.join(unknown)} in this transformers; there are {', '.join(known)}")
    if depth < 1:
        raise UsageError(f"--depth must be 1 or more, not {depth}")
    return _try_all(names or known, depth, experts, timeout_s)


def _try_all(names: list[str], depth: int, experts: str, timeout_s: float) -> Iterator[Row]:
    for name in names:
        case = Case(family=name, depth=depth_as_released(name, depth), experts=experts)
        try:
            yield Row(**run_isolated("glowplug.bench.sweep", json.dumps(asdict(case)), timeout_s=timeout_s))
        except IsolatedError as exc:
            yield Row(family=name, depth=case.depth, reasons=[str(exc)])


def try_family(case: Case) -> Row:
    """Build a family's model, run it eager, run it again as a program of uncompiled pieces, and compare."""
    row = Row(family=case.family, depth=case.depth)
    try:
        model = build_family(case.family, case.depth)
    except Exception as exc:
        row.reasons.append(f"no tiny model of it: {type(exc).__name__}: {one_line(exc)}")
        return row
    stack = stack_of(model)
    row.kinds = len(set(stack.kinds)) if stack is not None else 0
    with torch.no_grad():
        try:
            expected = _steps(model)
        except Exception as exc:
            row.reasons.append(f"transformers' own forward fails: {type(exc).__name__}: {one_line(exc)}")
            return row
        glowplug.compile(model, experts=case.experts, compiler="eager")
        actual = _steps(model)
    report = glowplug.report(model)
    row.error = max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))
    row.strategy, row.template = report.strategy, report.template_layers
    row.pieces, row.distinct = report.pieces, report.distinct_pieces
    row.reasons = [fallback.reason for fallback in report.fallbacks]
    return row


def _steps(model: PreTrainedModel) -> list[Tensor]:
    """The logits of a prefill, a decode step and a step of a few more tokens."""
    sequence = Sequence(model, Text.make(model, sum(_STEPS)))
    sequence.cache = new_cache(model)
    return [sequence.step(tokens) for tokens in _STEPS]


def markdown(rows: list[Row], versions: str) -> str:
    """The rows as a Markdown page."""
    as_released = [row for row in rows if "(" in row.family]
    families, depth = [row for row in rows if row not in as_released], min(row.depth for row in rows)
    ropes = f"; {_stamped(as_released)} with the rope of released checkpoints" if as_released else ""
    deeper = ", ".join(f"{row.family}: {row.depth}" for row in rows if row.depth != depth)
    lines = [
        "# Which families of transformers are stamped, and why not the others?",
        "",
        f"{_stamped(families)} families stamped at {depth} layers{f' ({deeper})' if deeper else ''}{ropes}, tiny "
        f"widths, uncompiled pieces; {versions}.",
        "`glowplug sweep --markdown docs/families.md` makes this page.",
        "*Kinds*: of layers. *Template*: how many layers were traced.",
        "*Error*: largest relative error of the logits against eager, over a prefill and two more steps.",
        "Each family has its default config. Where released checkpoints use another rope, an extra row names it.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    lines += [f"| {' | '.join(cell.replace('|', _BAR) for cell in row.cells())} |" for row in rows]
    return "\n".join([*lines, ""])


def _stamped(rows: list[Row]) -> str:
    return f"{sum(row.strategy == 'stamped' for row in rows)} of {len(rows)}"


if __name__ == "__main__":
    run_worker(
        lambda case: asdict(try_family(Case(**case))),
        lambda case, error: asdict(Row(family=case["family"], depth=case["depth"], reasons=[f"failed: {error}"])),
    )
