"""HTML for notebooks: one element with inline styles and no scripts, legible on a light and on a dark background.

Text inherits the notebook's colour; only blocks, which have a background of their own, set one.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from glowplug.show.pieces import Block, LayerBlocks, Programs, letter, name_layers, read_programs

if TYPE_CHECKING:
    from glowplug.explain import Explanation
    from glowplug.report import Fallback, Report

_BLOCK = (
    "display:inline-block;min-width:1em;padding:0 4px;border:1px solid rgba(128,128,128,.7);border-radius:3px;"
    "text-align:center;"
)
_FAINT = "opacity:.75;font-size:85%;"
_STEPS = {
    "eager": "ran eager",
    "hoisted": "traced every layer",
    "op": "left ops uncompiled",
    "launches": "launched kernels one by one",
}


def report_html(report: Report) -> str:
    """A report as HTML."""
    fallbacks = {f"{fallback.to}: {fallback.reason}" for fallback in report.fallbacks}
    heading, *rest = [line for line in str(report).splitlines() if line not in fallbacks]
    programs = _programs(read_programs(report.outlines))
    return _page(heading, [f"serving: {report.serving}", *rest], programs + _steps_down(report.fallbacks))


def explanation_html(explanation: Explanation) -> str:
    """An explanation as HTML."""
    differences = [html.escape(str(difference)) for difference in explanation.differences]
    shown = _programs(explanation.programs) + _list("Pieces that are equal but for a constant", differences)
    return _page(explanation.heading[0], explanation.heading[1:], shown + _steps_down(explanation.fallbacks))


def _page(heading: str, lines: Iterable[str], content: str) -> str:
    """The element; `content` is HTML, all else is text."""
    text = "".join(f'<div style="{_FAINT}">{html.escape(line)}</div>' for line in lines)
    return (
        '<div style="font-family:sans-serif;line-height:1.5;text-align:left;overflow-wrap:anywhere">'
        f"<div><b>{html.escape(heading)}</b></div>{text}{content}</div>"
    )


def _programs(programs: Programs) -> str:
    """A strip of blocks for each program, and what the names of the blocks stand for."""
    steps = [block for program in programs.layers for row in program for block in row.blocks]
    ops = {name: letter(at).lower() for at, name in enumerate(dict.fromkeys(s.name for s in steps if s.piece is None))}
    strips = "".join(_strip(program, ops) for program in programs.layers)
    legend = [_meaning(number, piece.name, piece.what) for number, piece in enumerate(programs.pieces)]
    legend += [_meaning(None, short, op) for op, short in ops.items()]
    return strips + "".join(legend)


def _strip(program: Sequence[LayerBlocks], ops: Mapping[str, str]) -> str:
    columns = "".join(_column(row, ops) for row in program)
    return f'<div style="display:flex;flex-wrap:wrap;gap:6px;margin:8px 0">{columns}</div>'


def _column(row: LayerBlocks, ops: Mapping[str, str]) -> str:
    """The blocks of a layer above its index."""
    label = "" if row.layer is None else str(row.layer)
    blocks = "".join(_block(block, ops) for block in row.blocks)
    return (
        '<div style="text-align:center"><div style="display:flex;gap:1px">'
        f'{blocks}</div><div style="{_FAINT}">{label}</div></div>'
    )


def _block(block: Block, ops: Mapping[str, str]) -> str:
    kind, short = ("op", ops[block.name]) if block.piece is None else ("piece", block.name)
    where = f", {name_layers(block.layers)}" if block.layers else ""
    title = html.escape(f"{kind} {block.name}{where}")
    return f'<span title="{title}" style="{_BLOCK}{_colour(block.piece)}">{html.escape(short)}</span>'


def _meaning(piece: int | None, short: str, text: str) -> str:
    """What the name of a block stands for."""
    block = f'<span style="{_BLOCK}{_colour(piece)}">{html.escape(short)}</span>'
    return f'<div style="margin:2px 0">{block} <span style="{_FAINT}">{html.escape(text)}</span></div>'


def _colour(piece: int | None) -> str:
    """The colours of a block: each distinct piece has a hue of its own, and is dark enough for white letters."""
    return _FAINT if piece is None else f"color:#fff;background:hsl({piece * 137.5 % 360:.0f},50%,32%);"


def _steps_down(fallbacks: Sequence[Fallback]) -> str:
    """Each step down the ladder, with its reason."""
    rows = [f"<b>{_STEPS[one.to]}</b>: {html.escape(one.reason + one.where)}" for one in fallbacks]
    return _list("Steps down", rows)


def _list(title: str, rows: Iterable[str]) -> str:
    """A titled list of HTML; empty without rows."""
    items = "".join(
        f'<div style="border-left:3px solid #c60;padding-left:8px;margin:4px 0">{row}</div>' for row in rows
    )
    return f'<div style="margin-top:8px">{html.escape(title)}</div>{items}' if items else ""
