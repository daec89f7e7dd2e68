"""`glowplug.explain`: a model's pieces, which layers share them, and which arguments keep pieces distinct."""

from __future__ import annotations

import itertools
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from glowplug.api import is_causal_lm
from glowplug.engine import Engine
from glowplug.errors import CaptureError, UsageError
from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.sources import layer_index
from glowplug.options import Options
from glowplug.report import Report


@dataclass(frozen=True)
class Difference:
    """One argument that differs between pieces that are otherwise equal.

    Attributes:
        op: the op whose argument differs.
        argument: its position or name; `"output"` if a shape, dtype or stride differs.
        values: piece name -> value of the argument.
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
        layers: for each run, the layers whose weights it reads, such as `"3-4"`.
        ops: number of ops.
    """

    name: str
    fingerprint: Fingerprint
    count: int
    layers: tuple[str, ...]
    ops: int


@dataclass(frozen=True)
class Explanation:
    """The result of `glowplug.explain`.

    Attributes:
        identity: how layer ops identify their layer.
        experts: `"inline"`, `"opaque"` or `"none"`.
        pieces: the distinct pieces.
        layout: the program in short, such as `A (attention B)x35 attention C`.
        differences: the arguments in which otherwise equal pieces differ.
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
    """Capture a model, cut it, and show what keeps its pieces distinct. Compiles nothing; the model does not change.

    Args:
        model: a transformers causal language model, or any module with example arguments of its forward.
        args: example arguments, for a module that is not a transformers causal language model.
        identity: as for `glowplug.compile`; `"baked"` shows the cost of names in graphs.
        experts: as for `glowplug.compile`.
        kwargs: example keyword arguments.

    Raises:
        CaptureError: the model can't be captured; the message has the reason.
        UsageError: an option is wrong, or example arguments are missing.
    """
    options = Options(identity=identity, experts=experts, compiler="eager", verify="off", stamp="off")  # type: ignore[arg-type]
    report = _run(model, options, args, kwargs)
    kinds: tuple[int, ...] = ()
    if is_causal_lm(model):
        from glowplug.frontends.hf.discover import stack_of

        stack = stack_of(model)
        kinds = stack.kinds if stack is not None else ()
    return _summarise(report, options.resolved_identity, kinds)


def explain_program(model: nn.Module, *args: Any, identity: str = "auto", experts: str = "auto", **kwargs: Any) -> str:
    """The Python text of the program that runs a model; if the model can be stamped, with a loop over its layers.

    Compiles nothing; the model does not change. Arguments and errors as for `explain`.
    """
    options = Options(identity=identity, experts=experts, compiler="eager", verify="off")  # type: ignore[arg-type]
    return _run(model, options, args, kwargs).sources[-1]


def _run(model: nn.Module, options: Options, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Report:
    """The report of a model that was captured but not attached."""
    if is_causal_lm(model) and not args and not kwargs:
        from glowplug.frontends.hf.front import HfFrontEnd

        report = Engine(HfFrontEnd(model, options), options).prepare()
    elif args or kwargs:
        from glowplug.frontends.plain.front import PlainFrontEnd

        engine = Engine(PlainFrontEnd(model, options), options)
        with torch.no_grad():
            engine(*args, **kwargs)
        report = engine.report
    else:
        raise UsageError("explain needs example arguments for this module: glowplug.explain(module, x)")
    if not report.outlines:
        reasons = "; ".join(fallback.reason for fallback in report.fallbacks) or "nothing was compiled"
        raise CaptureError(f"the model can't be captured: {reasons}")
    return report


def _summarise(report: Report, identity: str, kinds: tuple[int, ...]) -> Explanation:
    names: dict[Fingerprint, str] = {}
    runs: dict[Fingerprint, list[str]] = {}
    words = []
    for step in itertools.chain.from_iterable(report.outlines):
        if step.fingerprint is None:
            words.append((step.op or "").rpartition("::")[2])
            continue
        name = names.setdefault(step.fingerprint, _letter(len(names)))
        runs.setdefault(step.fingerprint, []).append(_layers_of(step.sources))
        words.append(name)
    pieces = tuple(
        PieceSummary(name, fingerprint, len(runs[fingerprint]), _shorten(runs[fingerprint]), _ops(fingerprint))
        for fingerprint, name in names.items()
    )
    return Explanation(identity, report.experts, pieces, _fold(words), tuple(_differences(pieces)), kinds)


def _ops(fingerprint: Fingerprint) -> int:
    return sum(line.target not in ("input", "return") for line in fingerprint.lines)


def _letter(number: int) -> str:
    letters = string.ascii_uppercase
    return letters[number] if number < 26 else f"{letters[number // 26 - 1]}{letters[number % 26]}"


def _layers_of(sources: Sequence[str]) -> str:
    """The range of layer indices in the sources: `"3"`, or `"3-4"`."""
    indices = {index for index in map(layer_index, sources) if index is not None}
    return f"{min(indices)}-{max(indices)}" if len(indices) > 1 else "".join(map(str, indices))


def _shorten(runs: Sequence[str]) -> tuple[str, ...]:
    return tuple(runs) if len(runs) <= 4 else (runs[0], runs[1], "...", runs[-1])


def _fold(words: Sequence[str]) -> str:
    """Write repetitions as `(attention B)x35`, for periods of up to 12 steps."""
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
    return [difference for group in skeletons.values() for difference in _compare(group)]


def _compare(group: Sequence[PieceSummary]) -> list[Difference]:
    """The differences between pieces that run the same ops; none for a single piece."""
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
    differences: dict[tuple[str, str, tuple[str, ...]], Difference],
    group: Sequence[PieceSummary],
    op: str,
    argument: str,
    values: Sequence[str],
) -> None:
    by_piece = {piece.name: value for piece, value in zip(group, values, strict=True)}
    difference = Difference(op, argument, by_piece, _hint(argument, values))
    differences.setdefault((op, argument, tuple(values)), difference)


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
