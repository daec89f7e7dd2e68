"""Finds out from the source of a layer's class whether it computes with an attribute that should merely name it.

Every attention layer passes `layer_idx` to the cache. But if a method compares it, uses it as an index or calculates
with it, each layer is a kind of its own: a short template would not show what the remaining layers do.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

NAMING = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index"})
"""Attributes that may merely name the layer."""
_CONSTRUCTORS = frozenset({"__init__", "_init_weights"})
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def computed_with(module: nn.Module) -> frozenset[str]:
    """The naming attributes that the methods of a module's class use for anything but passing them to a cache, directly
    or through a child module.

    Constructors and methods that only constructors call don't count, because their results lie in other attributes. If
    a method has no source, every naming attribute that it mentions counts.
    """
    used: set[str] = set()
    for base in _bases(type(module)):
        for name, function in vars(base).items():
            mentioned = _mentions(function)
            if not mentioned or _only_constructs(type(module), name):
                continue
            tree = _tree(function)
            used |= _Uses(tree, module).names if tree is not None else mentioned
    return frozenset(used)


@functools.lru_cache(maxsize=1024)
def mentions(cls: type[nn.Module]) -> bool:
    """Whether any method of a class except its constructor mentions a naming attribute."""
    return any(_mentions(function) for base in _bases(cls) for function in vars(base).values())


def _bases(cls: type) -> list[type]:
    """A class and its bases, without torch's."""
    return [base for base in cls.__mro__ if base is not object and not base.__module__.startswith("torch.")]


def _mentions(function: object) -> frozenset[str]:
    """The naming attributes among the names in a function's code and in the code of nested functions."""
    target = inspect.unwrap(function) if callable(function) else function
    code = getattr(target, "__code__", None)
    if code is None or getattr(target, "__name__", "") == "__init__":
        return frozenset()
    names = set(code.co_names)
    for constant in code.co_consts:
        names |= set(getattr(constant, "co_names", ()))
    return NAMING & frozenset(names)


def _tree(function: Any) -> ast.AST | None:
    """A function's parsed source; None if it has no source."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return None


def _only_constructs(cls: type, method: str) -> bool:
    """Whether only constructors call a method, judging by the files of the class's bases."""
    if method == "forward" or method.startswith("__"):
        return False
    places: set[str] = set()
    for base in _bases(cls):
        mentioning = _places(base.__module__)
        if mentioning is None:
            return False
        places |= mentioning.get(method, set())
    return bool(places) and places <= _CONSTRUCTORS


@functools.lru_cache(maxsize=64)
def _places(file: str) -> dict[str, set[str]] | None:
    """Name -> the innermost functions of a Python module that mention it as a name, an attribute or a string. None if
    the module has no source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[file]))
    except (OSError, TypeError, SyntaxError, KeyError):
        return None
    places: dict[str, set[str]] = {}
    for name, place in _mentioned(tree, ""):
        places.setdefault(name, set()).add(place)
    return places


def _mentioned(node: ast.AST, place: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        inner = getattr(child, "name", "a lambda") if isinstance(child, _Function) else place
        if isinstance(child, ast.Attribute):
            yield child.attr, place
        elif isinstance(child, ast.Name):
            yield child.id, place
        elif isinstance(child, ast.Constant) and isinstance(child.value, str) and child.value.isidentifier():
            yield child.value, place
        yield from _mentioned(child, inner)


class _Uses(ast.NodeVisitor):
    """Collects reads of naming attributes, except as arguments of a cache's methods or as indices into a cache.

    Args:
        tree: a method's source.
        module: the module that the method belongs to.
        parameter: if given, reads of this parameter of the method are collected instead.
    """

    def __init__(self, tree: ast.AST, module: nn.Module, parameter: str | None = None) -> None:
        self.names: set[str] = set()
        self.module = module
        self.parameter = parameter
        self.visit(tree)

    def visit_Call(self, node: ast.Call) -> None:
        """An argument does not count if it goes to a cache's method, directly or through a child module."""
        self.visit(node.func)
        child = self._child(node.func)
        for place, argument in [*enumerate(node.args), *((keyword.arg, keyword.value) for keyword in node.keywords)]:
            to_cache = _is_cache(node.func) or (child is not None and _passes_on(child, place))
            if not (self._is_name(argument) and to_cache):
                self.visit(argument)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """An index into a cache does not count either."""
        self.visit(node.value)
        if not (self._is_name(node.slice) and _is_cache(node.value)):
            self.visit(node.slice)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Any other read counts."""
        if self.parameter is None and node.attr in NAMING and isinstance(node.ctx, ast.Load):
            self.names.add(node.attr)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        """Any other read of the parameter counts, and any assignment to it."""
        if node.id == self.parameter:
            self.names.add(node.id)

    def _is_name(self, node: ast.AST) -> bool:
        if self.parameter is not None:
            return isinstance(node, ast.Name) and node.id == self.parameter
        return isinstance(node, ast.Attribute) and node.attr in NAMING

    def _child(self, node: ast.AST) -> nn.Module | None:
        """The child module that an expression of the form `self.name` stands for."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            return self.module._modules.get(node.attr)
        return None


def _passes_on(module: nn.Module, place: int | str | None) -> bool:
    """Whether a module's forward only passes an argument on to a cache."""
    forward: Callable[..., Any] = type(module).forward
    if "forward" in module.__dict__:
        return False
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    fixed = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    name = fixed[place] if isinstance(place, int) and place < len(fixed) else place
    tree = _tree(forward)
    return tree is not None and name in fixed and not _Uses(tree, module, str(name)).names


def _is_cache(node: ast.AST) -> bool:
    """Whether an expression is a variable named like a cache, or something reached through one."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return isinstance(node, ast.Name) and ("cache" in node.id or "past" in node.id)
