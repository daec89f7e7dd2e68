"""Parses Dynamo's source names, such as `L['model']._modules['lm_head'].training`. No other module reads them.

A source name says where a trace read an object. It is a Python expression over `L` (arguments of the traced function)
and `G` (its globals). The names are private; checked on torch 2.11 and 2.13. `Probe` checks once per process that this
torch still writes them in the same way.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glowplug.errors import UnsupportedTorchError


@dataclass(frozen=True)
class Access:
    """One step from an object to another.

    Attributes:
        by: `"attribute"`, `"item"`, or `"call"` (of `type` or `dict`).
        name: the attribute, the key, or the function.
    """

    by: Literal["attribute", "item", "call"]
    name: Any

    def of(self, owner: Any) -> Any:
        if self.by == "attribute":
            return getattr(owner, self.name)
        return owner[self.name] if self.by == "item" else _CALLS[self.name](owner)


_CALLS = {"type": type, "dict": dict}
Path = tuple[Access, ...]


@dataclass(frozen=True)
class Source:
    """A parsed source name.

    Attributes:
        root: an argument of the traced function, or the dotted name of a Python module.
        is_global: whether the root is a Python module.
        path: the accesses from the root.
        size: the dim, if the name stands for a size of the tensor at the path; None if for the object itself.
    """

    root: str
    is_global: bool = False
    path: Path = ()
    size: int | None = None

    def value(self, arguments: Mapping[str, Any]) -> Any:
        """The object at the source; raises LookupError if there is none."""
        return self.objects(arguments)[-1]

    def objects(self, arguments: Mapping[str, Any]) -> list[Any]:
        """All objects on the path, from the root to the object at the source."""
        return follow(sys.modules[self.root] if self.is_global else arguments[self.root], self.path)

    def modules(self) -> tuple[str, ...]:
        """The names of the modules on the path, each relative to its parent."""
        pairs = pairwise(self.path)
        return tuple(item.name for table, item in pairs if table == _MODULES and item.by == "item")

    def attributes(self) -> Iterator[tuple[Source, str]]:
        """Every attribute on the path, with its owner. `__dict__` stands for all attributes of its owner."""
        for index, access in enumerate(self.path):
            if access.by == "attribute":
                after = self.path[index + 1 : index + 2]
                in_dict = access.name == "__dict__" and after and after[0].by == "item"
                yield Source(self.root, self.is_global, self.path[:index]), (after[0] if in_dict else access).name


_MODULES = Access("attribute", "_modules")
_WEIGHTS = (Access("attribute", "_parameters"), Access("attribute", "_buffers"))


@functools.lru_cache(maxsize=65536)
def parse(text: str) -> Source | None:
    """Parse a source name; None if it stands for neither a Python object nor a size."""
    tree = _tree(text)
    return _chain(tree) if tree is not None else None


def _tree(text: str) -> ast.expr | None:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):
        return None


def _chain(node: ast.expr) -> Source | None:
    path: list[Access] = []
    size: int | None = None
    match node:
        case ast.Subscript(ast.Call(ast.Attribute(tensor, "size"), [], []), ast.Constant(int(dim))):
            node, size = tensor, dim
    while not isinstance(node, ast.Name):
        step = _last_access(node)
        if step is None:
            return None
        node = step[0]
        path.append(step[1])
    if not path or path[-1].by != "item" or not isinstance(path[-1].name, str):
        return None
    root, rest = path[-1].name, _without_copies(path[-2::-1])
    if node.id == "L":
        return Source(root, False, rest, size)
    if node.id == "G" and root.startswith(_IMPORT):
        return Source(root.removeprefix(_IMPORT).replace("_dot_", "."), True, rest, size)
    return None


_IMPORT = "__import_"


def _last_access(node: ast.expr) -> tuple[ast.expr, Access] | None:
    match node:
        case ast.Attribute(owner, name):
            return owner, Access("attribute", name)
        # Torch 2.11 writes this for a class with its own `__getattribute__`, such as transformers' configurations.
        case ast.Call(ast.Attribute(ast.Name("object"), "__getattribute__"), [owner, ast.Constant(str(name))]):
            return owner, Access("attribute", name)
        case ast.Subscript(owner, index) | ast.Call(ast.Attribute(ast.Name("dict"), "__getitem__"), [owner, index]):
            with contextlib.suppress(ValueError, TypeError):
                key = index.value if isinstance(index, ast.Constant) else ast.literal_eval(index)
                hash(key)
                return owner, Access("item", key)
        case ast.Call(ast.Name(function), [owner], []) if function in _CALLS:
            return owner, Access("call", function)
    return None


def _without_copies(path: Sequence[Access]) -> Path:
    """Turn `dict(x.__dict__)['name']` into the attribute of `x`. Dynamo writes the former to bypass descriptors."""
    accesses: list[Access] = []
    for access in path:
        is_copy = accesses[-2:] == [Access("attribute", "__dict__"), Access("call", "dict")]
        if is_copy and access.by == "item" and isinstance(access.name, str):
            accesses[-2:] = [Access("attribute", access.name)]
        else:
            accesses.append(access)
    return tuple(accesses)


def follow(root: Any, path: Sequence[Access]) -> list[Any]:
    """The objects along a path, `root` first; raises LookupError if the path leads nowhere."""
    objects = [root]
    for access in path:
        try:
            objects.append(access.of(objects[-1]))
        except Exception as exc:  # a property may raise anything
            raise LookupError(f"{access.name} is not there") from exc
    return objects


# -- questions about a name ----------------------------------------------------------------------------------


def attributes_in(text: str, names: Collection[str]) -> Iterator[tuple[Source | None, str]]:
    """The attributes among `names`, and `__dict__`, that a source mentions anywhere, each with its owner. The owner is
    None if it can't be determined."""
    if not any(name in text for name in (*names, "__dict__")):
        return
    tree = _tree(text)
    if tree is None:
        yield from ((None, name) for name in re.findall(r"\.(\w+)", text) if name in names)
        return
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        source = _chain(node) if isinstance(node, ast.expr) else None
        if source is not None:
            for owner, name in source.attributes():
                if name in names or name == "__dict__":
                    yield None if any(access.by == "call" for access in owner.path) else owner, name
            continue
        mentioned = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
        if isinstance(mentioned, str) and mentioned in names:
            yield None, mentioned
        nodes += ast.iter_child_nodes(node)


@functools.lru_cache(maxsize=1024)
def size_of(text: str) -> tuple[str, int] | None:
    """The tensor's source and the dim, for a size such as `L['x'].size()[0]`; None for anything else."""
    source = parse(text)
    return None if source is None or source.size is None else (text.rpartition(".size()")[0], source.size)


def is_weight(text: str) -> bool:
    """Whether a source lies in a module's parameters or buffers."""
    source = parse(text)
    return source is not None and any(access in _WEIGHTS for access in source.path)


def layer_index(text: str) -> int | None:
    """The index in the first module list on a source's path; None if there is none."""
    source = parse(text)
    return next((int(name) for name in source.modules() if name.isdigit()), None) if source is not None else None


def lies_in(text: str, stack: str) -> bool:
    """Whether a source lies in a member of the module list with the qualified name `stack`."""
    source, name = parse(text), stack.rpartition(".")[2]
    passed = source.modules() if source is not None else ()
    return any(one == name for one, _ in pairwise(passed)) if name else bool(passed)


def in_layer(text: str, stack: str) -> tuple[int, str] | None:
    """The index of the layer of a module list in which a source lies, and the rest of the source, for `at`; None
    outside the list."""
    source = parse(text)
    parts = [part for part in stack.split(".") if part]
    if source is None or source.is_global or source.size is not None:
        return None
    head = [access for part in parts for access in (_MODULES, Access("item", part))]
    after = source.path[len(head) :]
    if list(source.path[: len(head)]) != head or after[:1] != (_MODULES,) or not str(after[1].name).isdigit():
        return None
    if any(access.by == "call" for access in after):
        return None
    rest = (f".{access.name}" if access.by == "attribute" else f"[{access.name!r}]" for access in after[2:])
    return int(after[1].name), "".join(rest)


def at(owner: Any, rest: str) -> Any:
    """The object at the rest of a source, see `in_layer`; raises LookupError if there is none."""
    source = parse(f"L['owner']{rest}")
    assert source is not None
    return source.value({"owner": owner})


def module_path(text: str) -> str:
    """The qualified name of a module that an `nn_module_stack` calls, for example, `L['model'].layers.0`."""
    return text.removeprefix("L['model'].")


def named(text: str) -> str:
    """A source in readable form.

    Example:
        >>> named("L['model']._modules['layers']._modules['0']._parameters['weight']")
        'model.layers.0.weight'
    """
    parts = re.sub(r"^[LG]\['__import_|^[LG]\['", "", text)
    parts = re.sub(r"\._(?:modules|parameters|buffers)\['|\['", ".", parts)
    return parts.replace("']", "").replace("_dot_", ".").strip(".")


def read_by(guard: Any) -> str:
    """The source that a guard relies on, including the attribute or key that the guard tests for presence."""
    check = guard.create_fn
    details = getattr(check, "keywords", None) or {}
    test = getattr(getattr(check, "func", check), "__name__", "")
    if "attr" in details:
        return f"{guard.name}.{details['attr']}"
    if test == "DICT_CONTAINS" and "key" in details:
        return f"{guard.name}[{details['key']!r}]"
    return f"type({guard.name})" if test == "TYPE_MATCH" else str(guard.name)


# -- checking that torch still writes them in the same way ---------------------------------------------------

SCALE = 2.0
"""The global that the probe reads."""


class Probe(nn.Module):
    """A module whose trace, by a function of `model` and `x`, reads one object of each sort."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2, device="cpu")])
        self.scale = 3.0
        self.example = torch.zeros(5, 2, device="cpu")
        torch._dynamo.mark_dynamic(self.example, 0)

    def forward(self, x: Tensor) -> Any:
        """Reads a weight, a size, an attribute, a type and a global."""
        return self.layers[0](x) * (SCALE * self.scale) + x.new_ones(x.shape[0], 2)

    def check(self, inputs: Collection[str], reads: Collection[str]) -> None:
        """Compare the sources that a trace reported with the objects that the module is known to read.

        Args:
            inputs: sources of the graph's inputs.
            reads: sources of everything else.

        Raises:
            UnsupportedTorchError: an expected source is missing.
        """
        layer = self.layers[0]
        weights = [text for text in inputs if is_weight(text) and layer_index(text) == 0]
        seen = {
            "weights": any(self._at(text) is layer.weight for text in weights),
            "sizes": ("L['x']", 0) in map(size_of, inputs),
            "attributes": any(self._at(text) is self.scale for text in reads),
            "types": any(self._at(text) is type(layer) for text in reads),
            "globals": any(self._at(text) is SCALE for text in reads),
        }
        missing = [sort for sort, is_seen in seen.items() if not is_seen]
        if missing:
            raise UnsupportedTorchError(
                f"torch {torch.__version__} names the {', '.join(missing)} that a trace reads in a way that glowplug "
                "does not know, so it could not notice when they change; it was checked on torch 2.11 and 2.13"
            )

    def _at(self, text: str) -> Any:
        source = parse(text)
        with contextlib.suppress(LookupError):
            return source.value({"model": self}) if source is not None and source.size is None else None
