"""A twin of a module: a copy that shares its weights and has a state of its own, to try things on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glowplug.closeness import distance
from glowplug.errors import NotStampableError
from glowplug.layers.reads import MARKS
from glowplug.layers.registry import LayerRegistry, register_layers
from glowplug.reasons import said

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest ||program - eager|| / ||eager||, compiled pieces. Half precision: 0.5, see `glowplug.hf.verify`."""
_EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
"""The same for uncompiled pieces. Half precision: 0.01."""


@dataclass(frozen=True)
class Twin:
    """A copy of a module.

    Attributes:
        model: the copy.
        registry: its layers.
        of: id of an object of the original -> its copy.
    """

    model: nn.Module
    registry: LayerRegistry
    of: Mapping[int, Any]


def make_twin(model: nn.Module) -> Twin:
    """Copy a module; parameters are shared, everything else is copied.

    Raises:
        NotStampableError: something in it can't be copied.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    if "forward" in model.__dict__:  # glowplug's own, which the copy is to lack
        memo[id(model.__dict__["forward"])] = "none"
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as exc:
        raise NotStampableError(f"the module can't be copied, so nothing can be compared: {said(exc)}") from exc
    twin.__dict__.pop("forward", None)
    return Twin(twin, register_layers(twin), memo)


def differs(actual: Any, expected: Any, *, exact: bool) -> str | None:
    """How two values differ by more than rounding; None when they don't."""
    return _Comparison(_EXACT if exact else _TOLERANCE, 0.01 if exact else 0.5).values(actual, expected, "the output")


def states_differ(actual: nn.Module, expected: nn.Module, *, exact: bool) -> str | None:
    """How what two twins keep (buffers, attributes) differs; None when it doesn't."""
    comparison = _Comparison(_EXACT if exact else _TOLERANCE, 0.01 if exact else 0.5)
    others = dict(expected.named_modules())
    for name, module in actual.named_modules():
        if name not in others:
            return f"{name} is new"
        reason = comparison.values(_kept(module), _kept(others[name]), name or "the module")
        if reason is not None:
            return reason
    return None


def _kept(module: nn.Module) -> dict[str, Any]:
    hidden = {"_parameters", "_modules", "forward", *MARKS}
    return {key: value for key, value in module.__dict__.items() if key not in hidden and not key.endswith("_hooks")}


class _Comparison:
    """Compares values, deeply."""

    def __init__(self, tolerance: Mapping[torch.dtype, float], otherwise: float) -> None:
        self.tolerance = tolerance
        self.otherwise = otherwise
        self.seen: dict[tuple[int, int], Any] = {}  # with the values: while they live, no other has their id

    def values(self, actual: Any, expected: Any, what: str) -> str | None:
        """How they differ, or None."""
        if actual is expected or isinstance(actual, nn.Module) or (id(actual), id(expected)) in self.seen:
            return None
        self.seen[id(actual), id(expected)] = (actual, expected)
        if type(actual) is not type(expected):
            return f"{what} is a {type(actual).__name__}, eager's a {type(expected).__name__}"
        if isinstance(actual, Tensor):
            return self.tensors(actual, expected, what)
        if isinstance(actual, dict):
            if actual.keys() != expected.keys():
                return f"{what} has other keys than eager's"
            return self.all([(actual[key], expected[key], f"{what}.{key}") for key in actual])
        if isinstance(actual, (list, tuple)):
            if len(actual) != len(expected):
                return f"{what} has {len(actual)} entries, eager's {len(expected)}"
            pairs = zip(actual, expected, strict=True)
            return self.all([(one, other, f"{what}[{at}]") for at, (one, other) in enumerate(pairs)])
        if isinstance(actual, (bool, int, float, complex, str, bytes)):
            return None if actual == expected else f"{what} is {actual!r}, eager's {expected!r}"
        if hasattr(actual, "__dict__") and not callable(actual):
            return self.values(vars(actual), vars(expected), what)
        return None

    def all(self, pairs: list[tuple[Any, Any, str]]) -> str | None:
        """The first difference."""
        return next((found for found in (self.values(*pair) for pair in pairs) if found is not None), None)

    def tensors(self, actual: Tensor, expected: Tensor, what: str) -> str | None:
        """How two tensors differ."""
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            return f"{what} is {tuple(actual.shape)} {actual.dtype}, eager's {tuple(expected.shape)} {expected.dtype}"
        if not actual.is_floating_point():
            return None if torch.equal(actual, expected) else f"{what} differs from eager's"
        if torch.equal(actual, expected):
            return None
        error = distance(actual, expected)
        allowed = self.tolerance.get(actual.dtype, self.otherwise)
        return None if error <= allowed else f"{what} differs from eager's by {error:.1e} (allowed {allowed:.0e})"
