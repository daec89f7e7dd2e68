"""A program: flat steps in generated Python, bound to weights and layers, with no lookups at run time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from glowplug.graph.fingerprint import Fingerprint
from glowplug.layers.handle import LayerHandle


@dataclass(frozen=True)
class StepOutline:
    """One step of a program, for reports.

    Attributes:
        op: the splitting op's name; None for a piece.
        fingerprint: the piece's fingerprint; None for an op.
        sources: paths of the weights and handles that the step reads.
    """

    op: str | None
    fingerprint: Fingerprint | None
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """A runnable program.

    Attributes:
        code: the function compiled from `source`: `code(slots, *arguments)` returns a tuple of the outputs.
        slots: the callable of each distinct piece, in the order of the text's names `piece_a`, `piece_b`, ...
        arguments: sources of the call arguments.
        source: the Python text that runs.
        names: the objects that the text's global names are bound to: ops, layers, tuples of weights.
        outline: the steps, for reports.
        rewrite: writes it again for the same objects: `rewrite(slots, wrap)`, see `Plan.write`.
    """

    code: Callable[..., tuple[Any, ...]]
    slots: Mapping[Fingerprint, Callable[..., Any]]
    arguments: tuple[str, ...]
    source: str
    names: Mapping[str, Any] = field(default_factory=dict, repr=False)
    outline: tuple[StepOutline, ...] = field(default=(), repr=False)
    rewrite: Callable[..., Program] | None = field(default=None, repr=False)

    @functools.cached_property
    def run(self) -> Callable[..., tuple[Any, ...]]:
        """`run(*arguments)`, with arguments in the order of `arguments`, returns a tuple of the outputs."""
        return functools.partial(self.code, tuple(self.slots.values()))

    def with_slots(self, others: Mapping[Fingerprint, Callable[..., Any]]) -> Program:
        """A copy of this program with other callables in some of its slots."""
        return replace(self, slots={slot: others.get(slot, run) for slot, run in self.slots.items()})

    def wrapped(self, wrap: Callable[[int, Callable[..., Any]], Callable[..., Any]]) -> Program:
        """This program with something in the place of each piece: `wrap(index, run)`, see `Plan.write`."""
        assert self.rewrite is not None
        return self.rewrite(self.slots, wrap)

    def listing(self) -> str:
        """The program's text, with a comment above that explains its names."""
        head = "# How the model runs: pieces, ops and weights are bound to the names below."
        slots = [f"# {piece_name(number)}: piece {slot.digest[:12]}" for number, slot in enumerate(self.slots)]
        names = [f"# {name}: {_describe(value)}" for name, value in self.names.items()]
        return "\n".join([head, *slots, *names, "", self.source])


def piece_name(number: int) -> str:
    """The name of a slot in a program's text: piece_a, ..., piece_z, piece_aa, ..."""
    letters = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return f"piece_{letters}"


def _describe(value: Any) -> str:
    """A bound object in a few words."""
    if isinstance(value, torch.Tensor):
        return f"a tensor, {_form(value)}"
    if isinstance(value, tuple) and value and all(isinstance(item, tuple) for item in value):
        row = (f"{len(item)} weights" if isinstance(item, tuple) else type(item).__name__ for item in value[0])
        return f"{len(value)} rows of {', '.join(row)}"
    if isinstance(value, tuple):
        return f"{len(value)} weights: {', '.join(map(_form, value))}"
    if isinstance(getattr(value, "__self__", None), LayerHandle):
        return f"finds {value.__self__.name}"
    return getattr(value, "__name__", type(value).__name__)


def _form(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
