"""A program: flat steps in generated Python, weights and layers bound, nothing looked up while it runs."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from glowplug.graph.fingerprint import Fingerprint
from glowplug.layers.handle import LayerHandle


@dataclass(frozen=True)
class Program:
    """A runnable program.

    Attributes:
        run: `run(*arguments)` -> tuple of the graph's outputs. Arguments in the order of `arguments`.
        arguments: sources of what changes from call to call.
        source: the Python text that runs.
        names: what the text's global names stand for: compiled pieces, ops, layers, tuples of weights.
        outline: its steps, for reports.
    """

    run: Callable[..., tuple[Any, ...]]
    arguments: tuple[str, ...]
    source: str
    names: dict[str, Any] = field(default_factory=dict, repr=False)
    outline: tuple[StepOutline, ...] = field(default=(), repr=False)

    def listing(self) -> str:
        """The program's text with a comment on top that says what its global names stand for."""
        known = [f"# {name}: {_describe(value)}" for name, value in self.names.items() if not name.startswith("__")]
        head = "# How the model runs: pieces, ops and weights are bound to the names below."
        return "\n".join([head, *known, "", self.source])

    def replacing(self, others: Mapping[int, Any]) -> Program:
        """The same steps with other objects: `others` gives them by the id of those that they stand in for. Whoever
        runs this program meanwhile sees nothing of it."""
        names = {name: others.get(id(value), value) for name, value in self.names.items()}
        own: Any = self.run
        run = types.FunctionType(own.__code__, dict(names), own.__name__, own.__defaults__, own.__closure__)
        return replace(self, run=run, names=names)


def _describe(value: Any) -> str:
    """A bound object in a few words."""
    if isinstance(value, torch.Tensor):
        return f"a tensor, {_form(value)}"
    if isinstance(value, tuple) and value and all(isinstance(item, tuple) for item in value):
        inside = ", ".join(
            f"{len(item)} weights" if isinstance(item, tuple) else type(item).__name__ for item in value[0]
        )
        return f"{len(value)} rows of {inside}"
    if isinstance(value, tuple):
        return f"{len(value)} weights: {', '.join(map(_form, value))}"
    if isinstance(value, torch.nn.Module):
        return type(value).__name__
    if isinstance(getattr(value, "__self__", None), LayerHandle):
        return f"finds {value.__self__.name}"
    return getattr(value, "__name__", "a compiled piece")


def _form(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"


@dataclass(frozen=True)
class StepOutline:
    """One step of a program, for reports.

    Attributes:
        op: the splitting op's name; None for a piece.
        fingerprint: the piece's; None for an op.
        sources: paths of the weights and handles that the step reads.
    """

    op: str | None
    fingerprint: Fingerprint | None
    sources: tuple[str, ...]
