"""How far values may differ: all tolerances of glowplug, and the comparison of values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Tolerance:
    """The largest allowed `distance` for float64 (`double`), float32 (`single`), float16 (`half`), and other dtypes
    such as bfloat16 (`less`)."""

    double: float
    single: float
    half: float
    less: float

    def of(self, dtype: torch.dtype) -> float:
        """The largest allowed distance of tensors of a dtype."""
        known = {torch.float64: self.double, torch.float32: self.single, torch.float16: self.half}
        return known.get(dtype, self.less)


EXACT = Tolerance(1e-12, 1e-5, 0.01, 0.01)
"""Between two runs of the same arithmetic: uncompiled pieces and the model's own forward."""
COMPILED = Tolerance(1e-12, 1e-5, 0.005, 0.03)
"""Between compiled code and its own graph on the same inputs, with the same outputs of layer ops.

The largest distances that `benchmarks/slot_tolerances.py` measured (Inductor on a CPU; gpt-oss, Qwen3-MoE, GLM-4 MoE,
Mixtral and Llama with random weights; 12 layers of hidden size 64 and 8 of 1024; inline and opaque experts, and trials
of their bodies), for single pieces without and with a flipped near tie of a router, and for the program's logits:

| dtype    | one piece | with a flipped near tie | whole program |
|----------|-----------|-------------------------|---------------|
| float32  | 4.2e-7    | none                    | 1.3e-6        |
| float16  | 1.3e-3    | none                    | 0.05          |
| bfloat16 | 9.1e-3    | 0.030                   | 0.16          |

In bfloat16 a router's near tie flipped in 1% to 10% of the comparisons (in the indices passed to opaque experts, or in
the output of a piece with inline experts). Mixtral computes its float32 routing weights from bfloat16 values, so they
differ by more than float32 rounding. `roundings` tells both from faults, see `difference`; none was refused."""
END_TO_END = Tolerance(1e-9, 1e-4, 0.05, 0.05)
"""Between a whole compiled program and the model's own forward, if there are no graphs to compare pieces with. One
wrong layer of many changes the output about as much as rounding does in a deep model of half precision, so both are
refused."""


_SMALLEST = 1e-6
"""Tensors of a smaller norm are scaled before they are compared."""


def distance(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| of floating point tensors of one shape; NaN if a value is NaN."""
    wide = torch.float64 if expected.dtype is torch.float64 else torch.float32
    actual, expected = actual.to(wide), expected.to(wide)
    error, size = torch.stack((torch.dist(actual, expected), expected.norm())).tolist()  # waits for a GPU once
    if math.isfinite(error) and _SMALLEST < size < math.inf:  # no square over- or underflows
        return float(error / size)
    if torch.equal(actual, expected):
        return 0.0
    apart = torch.where(actual == expected, 0, actual - expected)  # infinities may be equal
    finite = expected.nan_to_num(0.0, 0.0, 0.0)
    scale = finite.abs().max().clamp(min=1e-30)  # avoids overflow: masks hold the largest numbers
    return float((apart / scale).norm() / (finite / scale).norm().clamp(min=1e-30))


def difference(
    actual: Any, expected: Any, tolerance: Tolerance, what: str, roundings: Sequence[Any] = ()
) -> str | None:
    """How two values differ by more than rounding, in words; None if they don't.

    Args:
        actual: a tensor, a plain value, or a container or object of them.
        expected: the right value.
        tolerance: the allowed distance of floating point tensors.
        what: the value's name in the result.
        roundings: further right values, computed with other rounding. Floating point tensors may differ from
            `expected` by twice as much as these do, and other tensors wherever one of these does.
    """
    return _Comparison(tolerance).values(actual, expected, what, list(roundings))


class _Comparison:
    """Compares values recursively, but not the contents of modules and callables."""

    def __init__(self, tolerance: Tolerance) -> None:
        self.tolerance = tolerance
        self.seen: dict[tuple[int, int], Any] = {}  # keeps the values alive, so that their ids stay unique

    def values(self, actual: Any, expected: Any, what: str, roundings: list[Any]) -> str | None:
        if actual is expected or isinstance(actual, nn.Module) or (id(actual), id(expected)) in self.seen:
            return None
        self.seen[id(actual), id(expected)] = (actual, expected)
        if isinstance(actual, Tensor) and isinstance(expected, Tensor):
            return self.tensors(actual, expected, what, roundings)
        if type(actual) is not type(expected):
            return f"{what} is a {type(actual).__name__}, not a {type(expected).__name__}"
        if isinstance(actual, Mapping):
            if actual.keys() != expected.keys():
                return f"{what} has other keys"
            return self.entries(actual, expected, [(key, f"{what}.{key}") for key in actual], roundings)
        if isinstance(actual, (list, tuple)):
            if len(actual) != len(expected):
                return f"{what} has {len(actual)} entries, not {len(expected)}"
            return self.entries(actual, expected, [(at, f"{what}[{at}]") for at in range(len(actual))], roundings)
        if isinstance(actual, (bool, int, float, complex, str, bytes)):
            return None if actual == expected else f"{what} is {actual!r:.40}, not {expected!r:.40}"
        if hasattr(actual, "__dict__") and not callable(actual):
            return self.values(vars(actual), vars(expected), what, [vars(value) for value in roundings])
        return None

    def entries(self, actual: Any, expected: Any, keys: list[tuple[Any, str]], roundings: list[Any]) -> str | None:
        """The first difference between the entries of two containers."""
        for key, what in keys:
            problem = self.values(actual[key], expected[key], what, [value[key] for value in roundings])
            if problem is not None:
                return problem
        return None

    def tensors(self, actual: Tensor, expected: Tensor, what: str, roundings: list[Tensor]) -> str | None:
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            return f"{what} is {tuple(actual.shape)} {actual.dtype}, not {tuple(expected.shape)} {expected.dtype}"
        if not (actual.is_floating_point() and actual.layout is torch.strided) and torch.equal(actual, expected):
            return None
        if actual.is_complex():
            actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
            roundings = list(map(torch.view_as_real, roundings))
        if not actual.is_floating_point():
            apart = actual != expected
            for value in roundings:
                apart &= value == expected
            return f"{what} differs in {int(apart.sum())} of {apart.numel()} values" if apart.any() else None
        error = distance(actual, expected)
        allowed = max(self.tolerance.of(expected.dtype), *(2 * distance(value, expected) for value in roundings), 0.0)
        return None if error <= allowed else f"{what} differs by {error:.1e} (allowed {allowed:.0e})"
