"""Reads a call of a plain module. A program takes the tensors as arguments; everything else about the call is fixed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from glowplug.graph.sources import parse

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class PlainCall:
    """A call, read.

    Attributes:
        tensors: its distinct tensors, in order.
        places: for each leaf of the arguments, the index of its tensor; None for a constant.
        constants: for each leaf, the constant; None for a tensor.
        structure: the tree structure of `(args, kwargs)`.
        signature: identifies the program: all of the above except the tensors' sizes and values.
    """

    tensors: tuple[Tensor, ...]
    places: tuple[int | None, ...]
    constants: tuple[Any, ...]
    structure: Any
    signature: Hashable

    cache = None
    has_begun = False

    @property
    def device(self) -> torch.device:
        """The device of the first tensor."""
        return self.tensors[0].device

    def rebuild(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call with other tensors."""
        args, kwargs = _unflatten(tensors, self.places, self.constants, self.structure)
        return args, kwargs

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Source -> shape of each tensor."""
        return {f"L['tensors'][{index}]": tuple(tensor.shape) for index, tensor in enumerate(self.tensors)}

    def value(self, source: str) -> Any:
        """The value of a source in this call."""
        place = argument(source)
        assert place is not None
        tensor, dim = self.tensors[place[0]], place[1]
        return tensor if dim is None else tensor.shape[dim]


def argument(source: str) -> tuple[int, int | None] | None:
    """(index of a call's tensor, dim if the source is a size of it); None if the source is no argument."""
    parsed = parse(source)
    if parsed is None or parsed.root != "tensors" or len(parsed.path) != 1:
        return None
    return parsed.path[0].name, parsed.size


def read_plain(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> PlainCall | str:
    """Read a call. Returns the reason as a string if it can't be stamped."""
    leaves, structure = pytree.tree_flatten((args, dict(kwargs)))
    tensors: list[Tensor] = []
    places: list[int | None] = []
    constants: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if type(leaf) not in (Tensor, nn.Parameter):
                return f"an argument is a {type(leaf).__name__}"
            if not leaf.is_contiguous():
                return "an argument is not contiguous"
            place = next((index for index, tensor in enumerate(tensors) if tensor is leaf), len(tensors))
            if place == len(tensors):
                tensors.append(leaf)
            places.append(place)
            constants.append(None)
        elif isinstance(leaf, _PLAIN):
            places.append(None)
            constants.append(leaf)
        else:
            return f"an argument is a {type(leaf).__name__}"
    if not tensors:
        return "no argument is a tensor"
    signature = (
        structure,
        tuple(places),
        tuple((type(value), repr(value)) for value in constants),
        tuple((tensor.dtype, tensor.device, tensor.dim(), tensor.is_inference()) for tensor in tensors),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
    )
    return PlainCall(tuple(tensors), tuple(places), tuple(constants), structure, signature)


def traced_function(call: PlainCall) -> Callable[[nn.Module, list[Tensor]], tuple[Any, ...]]:
    """The module's forward as a function that takes a list of tensors and returns a flat tuple."""
    places, constants, structure = call.places, call.constants, call.structure

    def run(model: nn.Module, tensors: list[Tensor]) -> tuple[Any, ...]:
        args, kwargs = _unflatten(tensors, places, constants, structure)
        return tuple(pytree.tree_leaves(type(model).forward(model, *args, **kwargs)))

    return run


def _unflatten(tensors: Sequence[Any], places: Sequence[int | None], constants: Sequence[Any], structure: Any) -> Any:
    leaves = [constant if place is None else tensors[place] for place, constant in zip(places, constants, strict=True)]
    return pytree.tree_unflatten(leaves, structure)


def examples(call: PlainCall) -> list[Tensor]:
    """Copies of the call's tensors for the trace: sizes of at least 2 may vary."""
    copies = []
    for tensor in call.tensors:
        copied = tensor.detach().clone()
        for dim, size in enumerate(copied.shape):
            if size > 1:
                torch._dynamo.maybe_mark_dynamic(copied, dim)
        copies.append(copied)
    return copies
