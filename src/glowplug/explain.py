"""`glowplug.explain`: a model's pieces, which layers share them, and which arguments keep pieces distinct."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from glowplug.api import is_causal_lm
from glowplug.engine import Engine, engine_of
from glowplug.errors import CaptureError, GlowplugError, NotStampableError, UsageError
from glowplug.layers.copies import make_twin
from glowplug.layers.stack import find_repetition
from glowplug.options import Options
from glowplug.reasons import counted, said
from glowplug.report import Fallback, Report
from glowplug.show.html import explanation_html
from glowplug.show.pieces import PieceSummary, Programs, read_programs


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
        what = "the output" if self.argument == "output" else f"argument {self.argument}"
        return f"{what} of {self.op} differs ({shown}{more}). {self.hint}"


@dataclass(frozen=True)
class Explanation:
    """The result of `glowplug.explain`. A notebook shows it as a strip of coloured blocks, one for each step.

    Attributes:
        identity: how layer ops identify their layer.
        experts: `"inline"`, `"opaque"` or `"none"`.
        pieces: the distinct pieces.
        layout: the program in short, such as `A (attention B)x35 attention C`.
        differences: the arguments in which otherwise equal pieces differ.
        kinds: the kind of each layer of the stack, as a number; empty for a model without a stack.
        fallbacks: each step down the ladder, with its reason.
        programs: the steps of each layer.
    """

    identity: str
    experts: str
    pieces: tuple[PieceSummary, ...]
    layout: str
    differences: tuple[Difference, ...]
    kinds: tuple[int, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    programs: Programs = field(default=Programs((), ()), repr=False)

    @property
    def heading(self) -> list[str]:
        """The first lines: the numbers of pieces and layers, and the program in short."""
        total, distinct = sum(piece.count for piece in self.pieces), len(self.pieces)
        lines = [f"identity {self.identity}, experts {self.experts}: {counted(total, 'piece')}, {distinct} distinct"]
        if self.kinds:
            layout = _fold([f"k{kind}" for kind in self.kinds])
            kinds = counted(len(set(self.kinds)), "kind")
            lines.append(f"{counted(len(self.kinds), 'layer')} of {kinds}: {layout}")
        return [*lines, f"program: {self.layout}"]

    def __str__(self) -> str:
        lines = [*self.heading, *(f"  {piece.name}: {piece.what}" for piece in self.pieces)]
        if self.differences:
            lines.append("pieces that are equal but for a constant:")
            lines += [f"  {difference}" for difference in self.differences]
        elif len(self.pieces) > 1:
            lines.append("no two distinct pieces are equal but for a constant: nothing is left to hoist")
        lines += [f"{fallback.to}: {fallback.reason}" for fallback in self.fallbacks]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The explanation in a notebook."""
        return explanation_html(self)


def explain(model: nn.Module, *args: Any, identity: str = "auto", experts: str = "auto", **kwargs: Any) -> Explanation:
    """Capture a model, cut it, and show what keeps its pieces distinct. Compiles nothing; the model does not change.

    A plain module that `glowplug.compile` has compiled needs no example arguments: the programs that it runs are shown.
    A plain module that can't be copied is run once itself, with the example arguments.

    Args:
        model: a transformers causal language model, or any module with example arguments of its forward.
        args: example arguments, for a module that is not a transformers causal language model.
        identity: as for `glowplug.compile`; `"baked"` shows the cost of names in graphs.
        experts: as for `glowplug.compile`.
        kwargs: example keyword arguments.

    Raises:
        CaptureError: the model can't be captured; the message has the reason.
        UsageError: an option is wrong, example arguments are missing, or the module can't be run with them.
    """
    options = Options(identity=identity, experts=experts, compiler="eager", stamp="off", verify="off")  # type: ignore[arg-type]
    engine = _engine(model, options, args, kwargs)
    return _summarise(engine.report, engine.options.resolved_identity, _kinds(model, engine))


def explain_program(model: nn.Module, *args: Any, identity: str = "auto", experts: str = "auto", **kwargs: Any) -> str:
    """The Python text of the program that runs a model; if the model can be stamped, with a loop over its layers.

    Compiles nothing; the model does not change. Arguments and errors as for `explain`.
    """
    options = Options(identity=identity, experts=experts, compiler="eager", verify="off")  # type: ignore[arg-type]
    return _engine(model, options, args, kwargs).report.sources[-1]


def _engine(model: nn.Module, options: Options, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Engine:
    """An engine that has captured the model, and is not attached to it; or the one that is, of a compiled module."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"explain takes an nn.Module, not a {type(model).__name__}")
    attached = engine_of(model)
    if args or kwargs:
        engine = _captured(model, options, args, kwargs)
    elif is_causal_lm(model):
        from glowplug.frontends.hf.front import HfFrontEnd

        engine = Engine(HfFrontEnd(model, options), options)
        engine.prepare()
    elif attached is None:
        raise UsageError("explain needs example arguments for this module: glowplug.explain(module, x)")
    else:
        engine, own = attached, attached.options.resolved_identity
        if engine.report.serving == "nothing yet":
            raise UsageError("the module was compiled and not called yet; call it, or give explain example arguments")
        if options.identity not in ("auto", own):
            raise UsageError(
                f"the module was compiled with identity={own!r}; give explain example arguments to see another"
            )
    report = engine.report
    if not report.outlines:
        reasons = "; ".join(fallback.reason for fallback in report.fallbacks) or "nothing was compiled"
        raise CaptureError(f"the model can't be captured: {reasons}")
    return engine


def _captured(model: nn.Module, options: Options, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Engine:
    """An engine that has run a copy of a module, which shares its weights, as `compile` would run it."""
    from glowplug.frontends.plain.front import PlainFrontEnd

    attached = engine_of(model)
    own = model.__dict__.get("forward") if attached is None else attached.front.own
    copied = model
    if own is None:
        with contextlib.suppress(NotStampableError):
            copied = make_twin(model).model
    options = replace(options, stamp="auto", verify="once")
    engine = Engine(PlainFrontEnd(copied, options, own), options)
    try:
        with torch.no_grad():
            engine(*args, **kwargs)
    except GlowplugError:
        raise
    except Exception as exc:  # the module's own
        raise UsageError(f"the module can't be run with these example arguments: {said(exc)}") from exc
    return engine


def _kinds(model: nn.Module, engine: Engine) -> tuple[int, ...]:
    """The kind of each layer of the model's stack; empty if it has none."""
    if is_causal_lm(model):
        from glowplug.frontends.hf.discover import stack_of

        stack = stack_of(model)
    else:
        stack = find_repetition(model, engine.compilation.read_attributes)
    return stack.kinds if stack is not None else ()


def _summarise(report: Report, identity: str, kinds: tuple[int, ...]) -> Explanation:
    programs = read_programs(report.outlines)
    return Explanation(
        identity,
        report.experts,
        programs.pieces,
        _fold(programs.words),
        tuple(_differences(programs.pieces)),
        kinds,
        tuple(report.fallbacks),
        programs,
    )


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
