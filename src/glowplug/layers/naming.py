"""Whether a class computes with an attribute that should merely name the layer, from its source text.

`layer_idx` is handed to the cache by every attention. A method that compares it, looks something up by it or counts
with it makes each layer a kind of its own; a short template would not show what the layers beyond it do.
"""

from __future__ import annotations

import ast
import inspect
import textwrap

from torch import nn

NAMING = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index"})
"""Attributes that may merely say which layer it is."""


def computed_with(cls: type[nn.Module]) -> frozenset[str]:
    """The naming attributes that a class's methods do anything with but hand to a cache.

    Constructors don't count: what they computed lies in attributes of its own. Without source, all of them.
    """
    found: set[str] = set()
    for base in cls.__mro__:
        if base in (nn.Module, object) or base.__module__.startswith("torch."):
            continue
        names = {name for function in vars(base).values() for name in _mentions(function)}
        if names:
            found |= _uses(base)
    return frozenset(found)


def _mentions(function: object) -> frozenset[str]:
    """Naming attributes among the names in a function's code, and in the code of functions inside it."""
    target = inspect.unwrap(function) if callable(function) else function
    code = getattr(target, "__code__", None)
    if code is None or getattr(target, "__name__", "") == "__init__":
        return frozenset()
    names = set(code.co_names)
    for constant in code.co_consts:
        names |= set(getattr(constant, "co_names", ()))
    return NAMING & frozenset(names)


def _uses(cls: type) -> set[str]:
    found: set[str] = set()
    for function in vars(cls).values():
        names = _mentions(function)
        if not names:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
        except (OSError, TypeError, SyntaxError):
            found |= names
            continue
        found |= _Uses(tree).found
    return found


class _Uses(ast.NodeVisitor):
    """Collects reads of naming attributes outside the arguments of a cache's methods and subscripts."""

    def __init__(self, tree: ast.AST) -> None:
        self.found: set[str] = set()
        self.visit(tree)

    def visit_Call(self, node: ast.Call) -> None:
        """Arguments of a cache's method are names only."""
        self.visit(node.func)
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            if not (_names(argument) and _is_cache(node.func)):
                self.visit(argument)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """So is an index into a cache."""
        self.visit(node.value)
        if not (_names(node.slice) and _is_cache(node.value)):
            self.visit(node.slice)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Any other read counts."""
        if node.attr in NAMING and isinstance(node.ctx, ast.Load):
            self.found.add(node.attr)
        self.generic_visit(node)


def _names(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in NAMING


def _is_cache(node: ast.AST) -> bool:
    """Whether an expression is, or is an attribute of, a variable that is called a cache."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return isinstance(node, ast.Name) and ("cache" in node.id or "past_key_value" in node.id)
