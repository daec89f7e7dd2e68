"""Dynamo's names for what a trace read, such as `L['model']._modules['lm_head'].training`, as chains of accesses.

The names are Python expressions over `L` (arguments of the traced function) and `G` (its globals). Checked on
torch 2.11 and 2.13.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Access:
    """One step from an object to another.

    Attributes:
        kind: `"attribute"`, `"item"`, or `"call"` of `type` or `dict`.
        name: the attribute, the key, or the function.
    """

    kind: Literal["attribute", "item", "call"]
    name: Any

    def of(self, owner: Any) -> Any:
        """What it leads to.

        Raises:
            AttributeError, LookupError, TypeError: it leads nowhere.
        """
        if self.kind == "attribute":
            return getattr(owner, self.name)
        return owner[self.name] if self.kind == "item" else _CALLS[self.name](owner)


_CALLS = {"type": type, "dict": dict}


@dataclass(frozen=True)
class Source:
    """A name, taken apart.

    Attributes:
        root: an argument of the traced function, or the dotted name of a Python module.
        is_global: whether it is a Python module.
        path: the accesses from there.
    """

    root: str
    is_global: bool
    path: tuple[Access, ...]


@functools.lru_cache(maxsize=65536)
def parse_source(text: str) -> Source | None:
    """Take a name apart; None for one that stands for no object of Python's, such as the size of an argument."""
    try:
        node: Any = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):
        return None
    path: list[Access] = []
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            path.append(Access("attribute", node.attr))
            node = node.value
        elif isinstance(node, ast.Subscript):
            key = _literal(node.slice)
            if key is _NOTHING:
                return None
            path.append(Access("item", key))
            node = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
            if len(node.args) != 1 or node.keywords:
                return None
            path.append(Access("call", node.func.id))
            node = node.args[0]
        else:
            return None
    if not path or path[-1].kind != "item" or not isinstance(path[-1].name, str):
        return None
    root, rest = path[-1].name, tuple(_without_copies(path[-2::-1]))
    if node.id == "L":
        return Source(root, False, rest)
    if node.id == "G" and root.startswith(_IMPORT):
        return Source(root.removeprefix(_IMPORT).replace("_dot_", "."), True, rest)
    return None


_IMPORT = "__import_"
_NOTHING = object()


def _literal(node: ast.expr) -> Any:
    try:
        key = ast.literal_eval(node)
        hash(key)
    except (ValueError, TypeError):
        return _NOTHING
    return key


def _without_copies(path: Sequence[Access]) -> list[Access]:
    """`dict(x.__dict__)['name']` is an attribute of `x`, read past its descriptor."""
    made: list[Access] = []
    for access in path:
        copied = made[-2:] == [Access("attribute", "__dict__"), Access("call", "dict")]
        if copied and access.kind == "item" and isinstance(access.name, str):
            made[-2:] = [Access("attribute", access.name)]
        else:
            made.append(access)
    return made


def plain_source(text: str) -> str:
    """A name with plain accesses: of an object whose class has a `__getattribute__` of its own, as transformers'
    configurations have, torch 2.11 says `object.__getattribute__(x, 'name')`; of a dict that somebody goes over,
    `dict.__getitem__(x, key)`."""
    if "object.__getattribute__(" not in text and "dict.__getitem__(" not in text:
        return text
    try:
        return ast.unparse(_Plain().visit(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError):
        return text


class _Plain(ast.NodeTransformer):
    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Write a call of the two as the access that it is."""
        self.generic_visit(node)
        match node:
            case ast.Call(ast.Attribute(ast.Name("object"), "__getattribute__"), [owner, ast.Constant(str(name))]):
                return ast.Attribute(owner, name, ast.Load())
            case ast.Call(ast.Attribute(ast.Name("dict"), "__getitem__"), [owner, key]):
                return ast.Subscript(owner, key, ast.Load())
        return node


def follow(root: Any, path: Sequence[Access]) -> list[Any]:
    """The objects along a path, `root` first.

    Raises:
        AttributeError, LookupError, TypeError: it leads nowhere.
    """
    objects = [root]
    for access in path:
        objects.append(access.of(objects[-1]))
    return objects
