"""Reads the outlines of programs: the distinct pieces, and the steps of each layer."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.sources import parse
from glowplug.program.program import StepOutline
from glowplug.reasons import counted

Path = tuple[str, ...]


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

    @property
    def what(self) -> str:
        """How often it runs, its size, and its layers, in words."""
        runs = "once" if self.count == 1 else f"{self.count} times"
        where = name_layers(", ".join(self.layers)) if any(self.layers) else "no layer's weights"
        return f"{runs}, {counted(self.ops, 'op')}, {where}"


@dataclass(frozen=True)
class Block:
    """One step of a program.

    Attributes:
        name: the name of the distinct piece, or of the op, without its namespace.
        piece: the number of the distinct piece, from 0; None for an op.
        layers: the first and the last layer that the step reads, such as `"3-4"`; empty if it reads none.
    """

    name: str
    piece: int | None
    layers: str


@dataclass(frozen=True)
class LayerBlocks:
    """The steps of one layer. A piece that lies in two layers belongs to the first.

    Attributes:
        layer: the layer's index; None for steps before the first layer, and in a program without layers.
        blocks: the steps, in the order in which they run.
    """

    layer: int | None
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Programs:
    """The programs of a model.

    Attributes:
        pieces: the distinct pieces of all programs.
        layers: for each program, the steps of each layer.
    """

    pieces: tuple[PieceSummary, ...]
    layers: tuple[tuple[LayerBlocks, ...], ...]

    @property
    def words(self) -> list[str]:
        """The names of all steps."""
        return [block.name for program in self.layers for row in program for block in row.blocks]


def read_programs(outlines: Sequence[Sequence[StepOutline]]) -> Programs:
    """Read the outlines of a model's programs."""
    names: dict[Fingerprint, str] = {}
    runs: dict[Fingerprint, list[str]] = {}
    programs = []
    for outline in outlines:
        rows: list[tuple[int | None, list[Block]]] = []
        for step, (first, last) in zip(outline, _ranges(outline), strict=True):
            layers = "" if first is None else str(first) if first == last else f"{first}-{last}"
            if step.fingerprint is None:
                block = Block((step.op or "").rpartition("::")[2], None, layers)
            else:
                name = names.setdefault(step.fingerprint, letter(len(names)))
                runs.setdefault(step.fingerprint, []).append(layers)
                block = Block(name, list(names).index(step.fingerprint), layers)
            home = first if first is not None else rows[-1][0] if rows else None
            if not rows or rows[-1][0] != home:
                rows.append((home, []))
            rows[-1][1].append(block)
        programs.append(tuple(LayerBlocks(layer, tuple(blocks)) for layer, blocks in rows))
    pieces = tuple(
        PieceSummary(name, fingerprint, len(runs[fingerprint]), _shorten(runs[fingerprint]), _ops(fingerprint))
        for fingerprint, name in names.items()
    )
    return Programs(pieces, tuple(programs))


def _ranges(outline: Sequence[StepOutline]) -> list[tuple[int, int] | tuple[None, None]]:
    """The first and the last layer that each step reads."""
    paths = [[_path(source) for source in step.sources] for step in outline]
    stack = _stack(paths)
    ranges: list[tuple[int, int] | tuple[None, None]] = []
    for step_paths in paths:
        indices = [index for path in step_paths for prefix, index in _members(path) if prefix == stack]
        ranges.append((min(indices), max(indices)) if indices else (None, None))
    return ranges


def _path(source: str) -> Path:
    """The names of the modules in which a source lies: a name of Dynamo's, or a qualified name."""
    parsed = parse(source)
    return parsed.modules() if parsed is not None else tuple(source.split("."))


def _members(path: Path) -> list[tuple[Path, int]]:
    """The module lists on a path, each with the index of the member that the path goes through."""
    return [(path[:at], int(name)) for at, name in enumerate(path) if name.isdecimal()]


def _stack(paths: Sequence[Sequence[Path]]) -> Path | None:
    """The module list whose members the steps tell apart the most; of equals the outermost."""
    first: dict[Path, set[int]] = {}
    for step_paths in paths:
        lowest: dict[Path, int] = {}
        for prefix, index in (member for path in step_paths for member in _members(path)):
            lowest[prefix] = min(index, lowest.get(prefix, index))
        for prefix, index in lowest.items():
            first.setdefault(prefix, set()).add(index)
    return max(first, key=lambda prefix: (len(first[prefix]), -len(prefix)), default=None)


def name_layers(layers: str) -> str:
    """Layers in words: `layer 3`, `layers 3-4`."""
    return f"layer{'' if layers.isdecimal() else 's'} {layers}"


def letter(number: int) -> str:
    """The name of a piece: A, ..., Z, AA, ..."""
    letters = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        letters = string.ascii_uppercase[digit] + letters
    return letters


def _shorten(runs: Sequence[str]) -> tuple[str, ...]:
    return tuple(runs) if len(runs) <= 4 else (runs[0], runs[1], "...", runs[-1])


def _ops(fingerprint: Fingerprint) -> int:
    return sum(line.target not in ("input", "return") for line in fingerprint.lines)
