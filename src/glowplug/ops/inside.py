"""The compiled inside of a layer op: another way to compute what the layer's forward computes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

INSIDE_ATTR = "_glowplug_inside"
"""Where a layer keeps its `Inside`; absent: its own forward runs."""


class Inside:
    """A compiled inside, bound to one layer. A copy of the layer does not inherit it.

    Args:
        layer: the layer.
        run: the compiled piece: takes the op's tensors, sizes and weights in `order`, returns a tuple of one tensor.
        order: for each input of `run` an expression over the op's tensors `a0`, `a1`, ..., or `"@"` and the path of a
            weight in the layer. Weights are looked up at each call, so that a replaced one is never missed.
        tokens: serve up to so many tokens; None: any number.
    """

    __slots__ = ("__weakref__", "_owner", "run", "tokens")

    def __init__(
        self, layer: nn.Module, run: Callable[..., Sequence[Tensor]], order: Sequence[str], tokens: int | None
    ) -> None:
        self._owner = weakref.ref(layer)
        self.tokens = tokens
        names: dict[str, Any] = {"piece": run}
        arguments = []
        for number, entry in enumerate(order):
            if entry.startswith("@"):
                names[f"table_{number}"], leaf = _table(layer, entry[1:])
                entry = f"table_{number}[{leaf!r}]"
            arguments.append(entry)
        count = 1 + max((int(entry[1]) for entry in order if entry[0] == "a"), default=0)
        parameters = ", ".join(f"a{number}" for number in range(count))
        self.run: Callable[..., Tensor] = eval(f"lambda {parameters}: piece({', '.join(arguments)})[0]", names)

    def serves(self, layer: nn.Module, hidden_states: Tensor) -> bool:
        """Whether a call of the layer with these tokens is to run compiled."""
        if self._owner() is not layer or not hidden_states.is_contiguous():
            return False
        return self.tokens is None or hidden_states.numel() <= self.tokens * hidden_states.shape[-1]

    def __deepcopy__(self, memo: object) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    return None


def _table(layer: nn.Module, path: str) -> tuple[Mapping[str, Any], str]:
    """The table of a module that holds a weight, and its name there."""
    parent, _, leaf = path.rpartition(".")
    module = layer.get_submodule(parent)
    tables: tuple[Mapping[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
    return next(table for table in tables if leaf in table), leaf
