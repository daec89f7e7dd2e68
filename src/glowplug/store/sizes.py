"""Writes expressions over sizes as trees of function names, symbol names and numbers. Reading never evaluates text."""

from __future__ import annotations

from typing import Any

import sympy
from torch.utils._sympy import functions as torch_functions

from glowplug.errors import ArtifactError, NotStorableError

_SYMPY = "Add Mul Pow Rational And Or Not Equality Unequality GreaterThan StrictGreaterThan LessThan StrictLessThan"
_TORCH = [cls for cls in vars(torch_functions).values() if isinstance(cls, type) and issubclass(cls, sympy.Basic)]
_FUNCTIONS = {cls.__name__: cls for cls in _TORCH} | {name: getattr(sympy, name) for name in _SYMPY.split()}
_POWERS = ("Pow", "PowByNatural", "FloatPow", "LShift")
_EXPONENTS = range(-16, 17)


def write_size(size: Any) -> Any:
    """The tree of an expression; NotStorableError if reading it back would not give an equal one."""
    tree = _tree(size)
    try:
        survives = read_size(tree) == size
    except Exception:  # an unknown function, or one that rejects its arguments
        survives = False
    if not survives:
        raise NotStorableError(f"the expression of sizes {size} can't be stored")
    return tree


def _tree(size: Any) -> Any:
    if isinstance(size, sympy.Symbol):
        return size.name
    if isinstance(size, sympy.Integer):
        return int(size)
    if isinstance(size, sympy.Rational):
        return ["Rational", size.p, size.q]
    if isinstance(size, sympy.Float):
        return float(size)
    if size in (sympy.true, sympy.false):
        return bool(size)
    return [size.func.__name__, *map(_tree, size.args)]


def read_size(tree: Any) -> Any:
    """The expression of a tree; ArtifactError if it is malformed or has a power that could be a huge number."""
    if isinstance(tree, (bool, int, float)):
        return sympy.sympify(tree)
    if isinstance(tree, str) and tree.isalnum() and tree[0] in "su" and tree[-1].isdigit():
        return sympy.Symbol(tree, integer=True, positive=True)
    if not (isinstance(tree, list) and tree and tree[0] in _FUNCTIONS):
        raise ArtifactError(f"it has a malformed expression of sizes: {tree!a}"[:120])
    if tree[0] in _POWERS and (tree[-1] not in _EXPONENTS or _has_power(tree[1])):
        raise ArtifactError(f"it has an expression of sizes with too large a power: {tree!a}"[:120])
    return _FUNCTIONS[tree[0]](*map(read_size, tree[1:]))


def _has_power(tree: Any) -> bool:
    return isinstance(tree, list) and (tree[0] in _POWERS or any(map(_has_power, tree[1:])))
