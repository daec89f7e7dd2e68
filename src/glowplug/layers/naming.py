"""Whether a layer computes with an attribute that should merely name it, from the source text of its class.

`layer_idx` is handed to the cache by every attention. A method that compares it, looks something up by it or counts
with it makes each layer a kind of its own; a short template would not show what the layers beyond it do.
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
"""Attributes that may merely say which layer it is."""
_CONSTRUCTORS = frozenset({"__init__", "_init_weights"})
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def computed_with(module: nn.Module) -> frozenset[str]:
    """The naming attributes that the methods of a module's class do anything with but hand to a cache, or to a module
    in it that hands it to a cache.

    Constructors don't count, nor does what they alone call: what they computed lies in attributes of its own. Without
    source, all of them.
    """
    found: set[str] = set()
    for base in _bases(type(module)):
        for name, function in vars(base).items():
            mentioned = _mentions(function)
            if not mentioned or _only_constructs(type(module), name):
                continue
            tree = _tree(function)
            found |= _Uses(tree, module).found if tree is not None else mentioned
    return frozenset(found)


@functools.lru_cache(maxsize=1024)
def mentions(cls: type[nn.Module]) -> bool:
    """Whether any method of a class but its constructor mentions a naming attribute."""
    return any(_mentions(function) for base in _bases(cls) for function in vars(base).values())


def _bases(cls: type) -> list[type]:
    """The classes that a class's own code lies in."""
    return [base for base in cls.__mro__ if base is not object and not base.__module__.startswith("torch.")]


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


def _tree(function: Any) -> ast.AST | None:
    """A function's source, parsed; None when it has none."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return None


def _only_constructs(cls: type, method: str) -> bool:
    """Whether a method is called by constructors alone, as far as the files of the class's bases show."""
    if method == "forward" or method.startswith("__"):
        return False
    places: set[str] = set()
    for base in _bases(cls):
        shown = _places(base.__module__)
        if shown is None:
            return False
        places |= shown.get(method, set())
    return bool(places) and places <= _CONSTRUCTORS


@functools.lru_cache(maxsize=64)
def _places(file: str) -> dict[str, set[str]] | None:
    """Name -> the innermost functions of a Python module that mention it, as a name, an attribute or a text. None
    without source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[file]))
    except (OSError, TypeError, SyntaxError, KeyError):
        return None
    found: dict[str, set[str]] = {}
    for name, place in _mentioned(tree, ""):
        found.setdefault(name, set()).add(place)
    return found


def _mentioned(node: ast.AST, place: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        inside = getattr(child, "name", "a lambda") if isinstance(child, _Function) else place
        if isinstance(child, ast.Attribute):
            yield child.attr, place
        elif isinstance(child, ast.Name):
            yield child.id, place
        elif isinstance(child, ast.Constant) and isinstance(child.value, str) and child.value.isidentifier():
            yield child.value, place
        yield from _mentioned(child, inside)


class _Uses(ast.NodeVisitor):
    """Collects reads of naming attributes outside the arguments of a cache's methods and subscripts.

    Args:
        tree: a method.
        module: the module that it is a method of.
        parameter: a parameter of the method that holds such an attribute; then it is the reads of that which count.
    """

    def __init__(self, tree: ast.AST, module: nn.Module, parameter: str | None = None) -> None:
        self.found: set[str] = set()
        self.module = module
        self.parameter = parameter
        self.visit(tree)

    def visit_Call(self, node: ast.Call) -> None:
        """Arguments of a cache's method are names only; so are those that a module inside hands to one."""
        self.visit(node.func)
        child = self._child(node.func)
        places = [*enumerate(node.args), *((keyword.arg, keyword.value) for keyword in node.keywords)]
        for place, argument in places:
            kept = _is_cache(node.func) or (child is not None and _hands_on(child, place))
            if not (self._names(argument) and kept):
                self.visit(argument)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """So is an index into a cache."""
        self.visit(node.value)
        if not (self._names(node.slice) and _is_cache(node.value)):
            self.visit(node.slice)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Any other read counts."""
        if self.parameter is None and node.attr in NAMING and isinstance(node.ctx, ast.Load):
            self.found.add(node.attr)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        """Any other read of the parameter, and any new value of it."""
        if node.id == self.parameter:
            self.found.add(node.id)

    def _names(self, node: ast.AST) -> bool:
        if self.parameter is not None:
            return isinstance(node, ast.Name) and node.id == self.parameter
        return isinstance(node, ast.Attribute) and node.attr in NAMING

    def _child(self, node: ast.AST) -> nn.Module | None:
        """The module that an expression of the form `self.name` is."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            return self.module._modules.get(node.attr)
        return None


def _hands_on(module: nn.Module, place: int | str | None) -> bool:
    """Whether the forward of a module does nothing with an argument but hand it to a cache."""
    forward: Callable[..., Any] = type(module).forward
    if "forward" in module.__dict__:
        return False
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    fixed = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    name = fixed[place] if isinstance(place, int) and place < len(fixed) else place
    tree = _tree(forward)
    return tree is not None and name in fixed and not _Uses(tree, module, str(name)).found


def _is_cache(node: ast.AST) -> bool:
    """Whether an expression is, or is an attribute of, a variable that is called a cache."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return isinstance(node, ast.Name) and ("cache" in node.id or "past" in node.id)
