"""One family of the sweep in a process of its own: `python -m glowplug.bench.sweep '<json case>'`.
The last line of its output is the row as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

import glowplug
from glowplug.bench.families import VOCAB, build_family, families
from glowplug.bench.isolate import IsolatedError, run_isolated
from glowplug.bench.models import one_line
from glowplug.errors import UsageError
from glowplug.hf.interfaces import token_mixers
from glowplug.layers.stack import find_stack

_STEPS = (9, 1, 3)
"""Tokens of each step, one after the other on one cache."""


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
    """What was found of a family.

    Attributes:
        family: its model type.
        depth: layers.
        strategy: `"stamped"`, `"hoisted"`, `"eager"`, or `""` when nothing ran.
        kinds: kinds of layers.
        template: layers that were traced, 0 when all were.
        pieces: pieces of the program.
        distinct: those that were compiled.
        error: largest relative error of the logits against eager; None when nothing ran.
        reasons: why it stepped down, or failed.
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


def sweep(names: list[str], depth: int, experts: str, timeout_s: float) -> Iterator[Row]:
    """Try families, each in a process of its own; a family that fails is a row with its reason.

    Args:
        names: model types; none: every MoE family.
        depth: layers of each.
        experts: as in `glowplug.compile`.
        timeout_s: seconds for each.

    Raises:
        UsageError: an unknown family, or a depth below 1.
    """
    known = families()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"no MoE family {', '.join(unknown)} in this transformers; there are {', '.join(known)}")
    if depth < 1:
        raise UsageError(f"--depth must be 1 or more, not {depth}")
    for name in names or known:
        case = Case(family=name, depth=depth, experts=experts)
        try:
            yield Row(**run_isolated("glowplug.bench.sweep", json.dumps(asdict(case)), timeout_s=timeout_s))
        except IsolatedError as exc:
            yield Row(family=name, depth=depth, reasons=[str(exc)])


def try_family(case: Case) -> Row:
    """Build a family's model, run it eager, compile it with uncompiled pieces, run it again and compare."""
    row = Row(family=case.family, depth=case.depth)
    try:
        model = build_family(case.family, case.depth)
    except Exception as exc:
        row.reasons.append(f"no tiny model of it: {type(exc).__name__}: {one_line(exc)}")
        return row
    mixers = list(token_mixers(model).values())
    stack = find_stack(model, mixers, model.config.get_text_config())
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
    row.error = max(
        float((a - e).abs().max() / e.abs().max().clamp(min=1e-30)) for a, e in zip(actual, expected, strict=True)
    )
    row.strategy, row.template = report.strategy, report.template_layers
    row.pieces, row.distinct = report.pieces, report.distinct_pieces
    row.reasons = [fallback.reason for fallback in report.fallbacks]
    return row


def _steps(model: PreTrainedModel) -> list[Tensor]:
    """The logits of a prefill, a decode step and a few tokens more."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCAB, (1, sum(_STEPS)), generator=generator)
    cache = DynamicCache(config=model.config.get_text_config())
    logits, start = [], 0
    for tokens in _STEPS:
        part = slice(start, start + tokens)
        positions = torch.arange(start, start + tokens)[None]
        output: Any = model(
            input_ids=ids[:, part].contiguous(), position_ids=positions, past_key_values=cache, use_cache=True
        )
        logits.append(output.logits)
        start += tokens
    return logits


def markdown(rows: list[Row], versions: str) -> str:
    """The rows as a Markdown page."""
    stamped = sum(row.strategy == "stamped" for row in rows)
    lines = [
        "# Every MoE family of transformers",
        "",
        f"{stamped} of {len(rows)} families stamped at {rows[0].depth} layers, tiny widths, uncompiled pieces; "
        f"{versions}.",
        "`glowplug sweep --markdown docs/families.md` makes this page. *Template*: how many layers were traced.",
        "*Error*: largest relative error of the logits against eager, over a prefill and two steps on its cache.",
        "",
        "| family | runs | kinds | template | pieces | distinct | error | why not stamped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = "" if row.error is None else f"{row.error:.0e}"
        why = "; ".join(row.reasons).replace("|", "\\|")
        cells = (
            row.family,
            row.strategy or "-",
            row.kinds,
            row.template or "all",
            row.pieces,
            row.distinct,
            error,
            why,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, ""])


def main(arguments: list[str]) -> int:
    """Try the family that the one argument names, and print its row."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    case = Case(**json.loads(arguments[0]))
    try:
        row = try_family(case)
    except Exception as exc:  # a failing family is a result
        row = Row(family=case.family, depth=case.depth, reasons=[f"failed: {type(exc).__name__}: {one_line(exc)}"])
    print("\n" + json.dumps(asdict(row)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
