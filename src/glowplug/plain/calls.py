"""Reads a call of a plain module: its tensors, and everything else about it, which the program takes for fixed."""

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
    """One call.

    Attributes:
        tensors: its tensors, in order.
        places: for each leaf of the arguments, which of the tensors it is; None for a constant.
        constants: for each leaf, the constant; None for a tensor.
        form: the structure of `(args, kwargs)`.
        signature: what a program is built for: all of the above but the tensors' sizes and values.
    """

    tensors: tuple[Tensor, ...]
    places: tuple[int | None, ...]
    constants: tuple[Any, ...]
    form: Any
    signature: Hashable

    def rebuild(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with other tensors in the place of this call's."""
        args, kwargs = _unflatten(tensors, self.places, self.constants, self.form)
        return args, kwargs

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Source -> shape of each tensor."""
        return {f"L['tensors'][{index}]": tuple(tensor.shape) for index, tensor in enumerate(self.tensors)}

    def value(self, source: str) -> Any:
        """What a source stands for."""
        found = argument(source)
        assert found is not None
        tensor = self.tensors[found[0]]
        return tensor if found[1] is None else tensor.shape[found[1]]


def argument(source: str) -> tuple[int, int | None] | None:
    """Which tensor of a call a source stands for, and which of its sizes; None for what no call gives."""
    found = parse(source)
    if found is None or found.root != "tensors" or len(found.path) != 1:
        return None
    return found.path[0].name, found.size


def read_plain(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> PlainCall | str:
    """Read a call; a string says why it can't be stamped."""
    leaves, form = pytree.tree_flatten((args, dict(kwargs)))
    tensors: list[Tensor] = []
    places: list[int | None] = []
    constants: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if type(leaf) not in (Tensor, nn.Parameter):
                return f"an argument is a {type(leaf).__name__}"
            if not leaf.is_contiguous():
                return "an argument is not contiguous"
            known = next((index for index, tensor in enumerate(tensors) if tensor is leaf), len(tensors))
            if known == len(tensors):
                tensors.append(leaf)
            places.append(known)
            constants.append(None)
        elif isinstance(leaf, _PLAIN):
            places.append(None)
            constants.append(leaf)
        else:
            return f"an argument is a {type(leaf).__name__}"
    if not tensors:
        return "no argument is a tensor"
    signature = (
        form,
        tuple(places),
        tuple((type(value), repr(value)) for value in constants),
        tuple((tensor.dtype, tensor.device, tensor.dim(), tensor.is_inference()) for tensor in tensors),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
    )
    return PlainCall(tuple(tensors), tuple(places), tuple(constants), form, signature)


def traced_function(call: PlainCall) -> Callable[[nn.Module, list[Tensor]], tuple[Any, ...]]:
    """The module's forward as a function of a flat list of tensors, which returns a flat tuple."""
    places, constants, form = call.places, call.constants, call.form

    def run(model: nn.Module, tensors: list[Tensor]) -> tuple[Any, ...]:
        args, kwargs = _unflatten(tensors, places, constants, form)
        return tuple(pytree.tree_leaves(type(model).forward(model, *args, **kwargs)))

    return run


def _unflatten(tensors: Sequence[Any], places: Sequence[int | None], constants: Sequence[Any], form: Any) -> Any:
    leaves = [constants[at] if place is None else tensors[place] for at, place in enumerate(places)]
    return pytree.tree_unflatten(leaves, form)


def examples(call: PlainCall) -> list[Tensor]:
    """The call's tensors as a capture is to see them: sizes of 2 and more may vary."""
    made = []
    for tensor in call.tensors:
        example = tensor.detach().clone()
        for dim, size in enumerate(example.shape):
            if size > 1:
                torch._dynamo.maybe_mark_dynamic(example, dim)
        made.append(example)
    return made
