"""`glowplug::rotary`: rotary embeddings whose tables depend on the length of the sequence, computed at a cut."""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glowplug.errors import NotServableError
from glowplug.ops.layer_op import layer_op
from glowplug.runtime.forks import make_lock


@dataclass(frozen=True)
class Form:
    """The output of a rotary module for positions with a certain number of dims.

    Attributes:
        layer_type: the `layer_type` argument; None if the module takes none, or none was passed.
        dropped: how many leading dims of the positions the tables lack.
        tables: width and dtype of each table; a dtype of None is that of the hidden states.
        several: whether the module returns a tuple.
    """

    layer_type: str | None
    dropped: int
    tables: tuple[tuple[int, str | None], ...]
    several: bool

    def to_text(self) -> str:
        """This form as a text, which `read_form` reads: an op's argument."""
        return repr((self.layer_type, self.dropped, self.tables, self.several))

    def of(self, x: Tensor, positions: Tensor) -> list[tuple[tuple[Any, ...], torch.dtype]]:
        """Shape and dtype of each table."""
        lead = tuple(positions.shape[self.dropped :])
        return [((*lead, width), x.dtype if name is None else getattr(torch, name)) for width, name in self.tables]


@functools.lru_cache(maxsize=256)
def read_form(text: str) -> Form:
    """The form that `Form.to_text` wrote."""
    return Form(*ast.literal_eval(text))


def _fake_rotary(x: Tensor, positions: Tensor, form: str) -> list[Tensor]:
    return [x.new_empty(shape, dtype=dtype) for shape, dtype in read_form(form).of(x, positions)]


_lock = make_lock()
"""Held while a module computes its tables, as it may change its own state meanwhile."""


@layer_op("glowplug::rotary", fake=_fake_rotary, splitting=True)
def rotary(layer: nn.Module, x: Tensor, positions: Tensor, form: str) -> list[Tensor]:
    """Run the module's own forward, which may rebuild its tables for the largest position, as in eager mode.

    Args:
        layer: the module, called as `layer.forward(x, positions)`, with `layer_type=` if the form has one.
        x: hidden states; only their dtype and device matter.
        positions: `[..., batch, tokens]`.
        form: the form that the trace assumed, see `Form`.

    Returns:
        The tables, such as cosines and sines, `[batch, tokens, width]`, contiguous.

    Raises:
        NotServableError: the output has another form.
    """
    expected = read_form(form)
    kwargs = {} if expected.layer_type is None else {"layer_type": expected.layer_type}
    with _lock:
        output = layer.forward(x, positions, **kwargs)
    tables = tables_of(output)
    wanted = expected.of(x, positions)
    if tables is None or [(tuple(table.shape), table.dtype) for table in tables] != wanted:
        raise NotServableError(
            f"the rotary embedding {type(layer).__name__} gives tables of another shape or dtype than it did when the "
            "program was made; call glowplug.compile(model) again"
        )
    return [table.contiguous() for table in tables]


def tables_of(output: Any) -> list[Tensor] | None:
    """The tensors that a rotary module returned; None if it returned anything else."""
    tables = list(output) if isinstance(output, tuple) else [output]
    return tables if tables and all(isinstance(table, Tensor) for table in tables) else None
