"""`glowplug.explain`: a model's pieces, which layers share them, and which argument keeps two pieces apart."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from glowplug.errors import CaptureError, UsageError
from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.sources import layer_index
from glowplug.options import Options
from glowplug.program.program import StepOutline
from glowplug.report import Report


@dataclass(frozen=True)
class Difference:
    """One argument that keeps pieces apart that are otherwise equal.

    Attributes:
        op: the op whose argument differs.
        argument: which: its position, or its name; `"output"` when a shape, dtype or stride differs.
        values: piece name -> what it has there.
        hint: what to do about it.
    """

    op: str
    argument: str
    values: dict[str, str]
    hint: str

    def __str__(self) -> str:
        shown = ", ".join(f"{piece}: {value}" for piece, value in list(self.values.items())[:4])
        more = f" and {len(self.values) - 4} more" if len(self.values) > 4 else ""
        return f"argument {self.argument} of {self.op} differs ({shown}{more}). {self.hint}"


@dataclass(frozen=True)
class PieceSummary:
    """One distinct piece.

    Attributes:
        name: `A`, `B`, ... in order of appearance.
        fingerprint: its canonical form.
        count: how often the program runs it.
        layers: the layers whose weights each of its runs reads, such as `"3-4"`.
        ops: how many ops it has.
    """

    name: str
    fingerprint: Fingerprint
    count: int
    layers: tuple[str, ...]
    ops: int


@dataclass(frozen=True)
class Explanation:
    """What `glowplug.explain` found.

    Attributes:
        identity: how layer ops say which layer they are.
        experts: `"inline"`, `"opaque"` or `"none"`.
        pieces: the distinct pieces.
        layout: the program in short, such as `A (attention B)x35 attention C`.
        differences: what keeps pieces apart that are equal but for constants.
        kinds: the kind of each layer of the stack, as a number; empty for a model without a stack.
    """

    identity: str
    experts: str
    pieces: tuple[PieceSummary, ...]
    layout: str
    differences: tuple[Difference, ...]
    kinds: tuple[int, ...] = ()

    def __str__(self) -> str:
        total = sum(piece.count for piece in self.pieces)
        lines = [
            f"identity {self.identity}, experts {self.experts}: {total} pieces, {len(self.pieces)} distinct",
            f"program: {self.layout}",
        ]
        if self.kinds:
            layout = _fold([f"k{kind}" for kind in self.kinds])
            lines.insert(1, f"{len(self.kinds)} layers of {len(set(self.kinds))} kinds: {layout}")
        for piece in self.pieces:
            where = f"layers {', '.join(piece.layers)}" if any(piece.layers) else "no layer's weights"
            lines.append(f"  {piece.name}: {piece.count} times, {piece.ops} ops, {where}")
        if self.differences:
            lines.append("pieces that are equal but for a constant:")
            lines += [f"  {difference}" for difference in self.differences]
        elif len(self.pieces) > 1:
            lines.append("no two distinct pieces are equal but for a constant: nothing is left to hoist")
        return "\n".join(lines)


def explain(model: nn.Module, *args: Any, identity: str = "auto", experts: str = "auto", **kwargs: Any) -> Explanation:
    """Capture a model, cut it, and say what keeps its pieces apart. Nothing is compiled; the model is left as it was.

    Args:
        model: a transformers causal language model, or any module together with example arguments of its forward.
        args: example arguments, for a module that is not a transformers causal language model.
        identity: as for `glowplug.compile`; `"baked"` shows what names in graphs would cost.
        experts: as for `glowplug.compile`.
        kwargs: example keyword arguments.

    Raises:
        CaptureError: the model can't be captured; the message has the reason.
        UsageError: a wrong option, or no example arguments where they are needed.
    """
    options = Options(identity=identity, experts=experts, compiler="eager", verify="off", stamp="off")  # type: ignore[arg-type]
    report = _run(model, options, args, kwargs)
    if not report.outlines:
        reasons = "; ".join(fallback.reason for fallback in report.fallbacks) or "nothing was compiled"
        raise CaptureError(f"the model can't be captured: {reasons}")
    steps = [step for outline in report.outlines for step in outline]
    return summarise(steps, options.resolved_identity, report, _kinds(model))


def explain_program(model: nn.Module, *args: Any, identity: str = "auto", experts: str = "auto", **kwargs: Any) -> str:
    """The Python text of the program that runs a model: stamped where it can be, its layers then a loop.

    Nothing is compiled; the model is left as it was. Arguments and errors as for `explain`.
    """
    options = Options(identity=identity, experts=experts, compiler="eager", verify="off")  # type: ignore[arg-type]
    report = _run(model, options, args, kwargs)
    if not report.sources:
        reasons = "; ".join(fallback.reason for fallback in report.fallbacks) or "nothing was compiled"
        raise CaptureError(f"the model can't be captured: {reasons}")
    return str(report.sources[-1])


def _kinds(model: nn.Module) -> tuple[int, ...]:
    """The kinds of the layers of a transformers model's stack."""
    from glowplug.api import is_causal_lm

    if not is_causal_lm(model):
        return ()
    from glowplug.hf.template import stack_of

    stack = stack_of(model)
    return stack.kinds if stack is not None else ()


def _run(model: nn.Module, options: Options, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Report:
    from glowplug.api import is_causal_lm

    if is_causal_lm(model) and not args and not kwargs:
        from glowplug.hf.engine import Engine

        return Engine(model, options).prepare()
    if not args and not kwargs:
        raise UsageError("explain needs example arguments for this module: glowplug.explain(module, x)")
    from glowplug.plain.engine import ModuleEngine

    engine = ModuleEngine(model, options)
    with torch.no_grad():
        engine(*args, **kwargs)
    return engine.report


def summarise(steps: Sequence[StepOutline], identity: str, report: Report, kinds: tuple[int, ...] = ()) -> Explanation:
    """Summarise the steps of a program."""
    names: dict[Fingerprint, str] = {}
    runs: dict[Fingerprint, list[str]] = {}
    words = []
    for step in steps:
        if step.fingerprint is None:
            words.append((step.op or "").rpartition("::")[2])
            continue
        name = names.setdefault(step.fingerprint, _letter(len(names)))
        runs.setdefault(step.fingerprint, []).append(_layers_of(step.sources))
        words.append(name)
    pieces = tuple(
        PieceSummary(name, found, len(runs[found]), _shorten(runs[found]), _ops(found)) for found, name in names.items()
    )
    return Explanation(identity, report.experts, pieces, _fold(words), tuple(_differences(pieces)), kinds)


def _ops(found: Fingerprint) -> int:
    return sum(line.target not in ("input", "return") for line in found.lines)


def _letter(number: int) -> str:
    letters = string.ascii_uppercase
    return letters[number] if number < 26 else f"{letters[number // 26 - 1]}{letters[number % 26]}"


def _layers_of(sources: Sequence[str]) -> str:
    """The indices of the layers that the sources lie in: `"3"`, or `"3-4"`."""
    indices = {index for index in map(layer_index, sources) if index is not None}
    return f"{min(indices)}-{max(indices)}" if len(indices) > 1 else "".join(map(str, indices))


def _shorten(runs: Sequence[str]) -> tuple[str, ...]:
    return tuple(runs) if len(runs) <= 4 else (runs[0], runs[1], "...", runs[-1])


def _fold(words: Sequence[str]) -> str:
    """Write repetition as `(attention B)x35`, trying periods up to 12 steps."""
    folded: list[str] = []
    start = 0
    while start < len(words):
        period, times = 1, 1
        for size in range(1, 13):
            count = 1
            while words[start : start + size] == words[start + count * size : start + (count + 1) * size]:
                count += 1
            if count > 1 and count * size > period * times:
                period, times = size, count
        body = " ".join(words[start : start + period])
        folded.append(body if times == 1 else f"({body})x{times}")
        start += period * times
    return " ".join(folded)


def _differences(pieces: Sequence[PieceSummary]) -> list[Difference]:
    skeletons: dict[tuple[str, ...], list[PieceSummary]] = {}
    for piece in pieces:
        skeletons.setdefault(tuple(line.target for line in piece.fingerprint.lines), []).append(piece)
    found = []
    for group in skeletons.values():
        if len(group) > 1:
            found += _compare(group)
    return found


def _compare(group: Sequence[PieceSummary]) -> list[Difference]:
    differences: dict[tuple[str, str, tuple[str, ...]], Difference] = {}
    for rows in zip(*(piece.fingerprint.lines for piece in group), strict=True):
        arguments = max(len(row.args) for row in rows)
        for position in range(arguments):
            values = [row.args[position] if position < len(row.args) else "absent" for row in rows]
            if len(set(values)) > 1:
                argument = next((v.partition("=")[0] for v in values if re.match(r"[a-z_]+=", v)), str(position))
                _add(differences, group, rows[0].target, argument, values)
        metas = [row.meta for row in rows]
        if len(set(metas)) > 1 and not any(d.op == rows[0].target for d in differences.values()):
            _add(differences, group, rows[0].target, "output", metas)
    return list(differences.values())


def _add(
    found: dict[tuple[str, str, tuple[str, ...]], Difference],
    group: Sequence[PieceSummary],
    op: str,
    argument: str,
    values: Sequence[str],
) -> None:
    key = (op, argument, tuple(values))
    found.setdefault(
        key, Difference(op, argument, {p.name: v for p, v in zip(group, values, strict=True)}, _hint(argument, values))
    )


def _hint(argument: str, values: Sequence[str]) -> str:
    if argument == "output":
        return "The pieces work on different shapes, dtypes or strides: these are different computations."
    common = Counter(value[:1] for value in values).most_common(1)[0][0]
    if common in "'\"":
        return "It names the layer: make the op a glowplug.layer_op, which passes a handle that is no constant."
    if common.isdigit() or common == "-":
        return (
            "Keep the number in the layer object, where a layer op reads it, or in a buffer; a constant is compiled in."
        )
    return "A different constant makes a different piece."
