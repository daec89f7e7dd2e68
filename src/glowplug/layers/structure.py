"""A model's structure as text that is equal in every process: what its forward can read, but for the weights' values.

Kinds compare layers of one model in one process, and may go by identity; a stored program must be told that this model
is the very one it was made for. What has no description that holds in another process makes a model not storable.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import types
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from glowplug.errors import NotStorableError
from glowplug.layers.registry import MARKS
from glowplug.layers.shards import is_mesh, is_placement, mesh_text, sharding_text, wrapped_forward
from glowplug.layers.watch import without_inert

_STANDARD = frozenset(nn.Module().__dict__) | MARKS
"""Attributes that every module has; those that matter are described on their own."""
_HOOKS = tuple(name for name in nn.Module().__dict__ if name.endswith("_hooks") and "backward" not in name)
_DEEPEST = 12
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})


def structure_of(model: nn.Module, skip: Collection[str] = (), followed: Iterable[nn.Module] = ()) -> str:
    """SHA-256, in hex, of everything about a model that its forward can read, but for the weights' values.

    Args:
        model: the model.
        skip: names of attributes, of modules or of objects that they hold, that no forward reads.
        followed: modules whose own forward runs at every call, so that no program depends on what they hold.

    Raises:
        NotStorableError: something about it can't be described; the message names it.
    """
    return hashlib.sha256("\n".join(_Description(model, frozenset(skip), followed).lines()).encode()).hexdigest()


class _Description:
    def __init__(self, model: nn.Module, skip: frozenset[str], followed: Iterable[nn.Module]) -> None:
        self.model = model
        self.skip = skip
        self.followed = set(map(id, followed))
        self.hidden = _STANDARD | skip
        self.modules = {id(module): path for path, module in model.named_modules()}
        self.objects: dict[int, str] = {}
        self.kept: list[Any] = []  # while they live, no other object has their id
        self.classes: dict[type, str] = {}
        self.tensors: dict[int, int] = {}

    def lines(self) -> Iterator[str]:
        """One line a module, in order."""
        for path, module in self.model.named_modules():
            yield f"{path}: {self.module(path, module)}"

    def module(self, path: str, module: nn.Module) -> str:
        cls = type(module)
        if cls not in self.classes:
            self.classes[cls] = self.function(cls, "a module")
        parts = [self.classes[cls], str(module.training)]
        table = module.__dict__
        for name in _HOOKS:
            if table[name] and without_inert(table[name]):
                raise NotStorableError(f"{path or 'the model'} has hooks")
        if id(module) in self.followed:
            return " ".join([*parts, "followed"])
        for group in ("_parameters", "_buffers"):
            parts += [f"{name}={self.tensor(tensor)}" for name, tensor in table[group].items()]
        parts += [
            f"{name}->{self.modules[id(child)]}" if child is not None else f"{name}->none"
            for name, child in table["_modules"].items()
        ]
        for name, value in table.items():
            if name in self.hidden or (name == "forward" and not path):
                continue
            if name == "forward" and wrapped_forward(module) is None:
                raise NotStorableError(f"the forward of {path} was replaced")
            parts.append(f"{name}:{self.value(value, name, 0)}")
        return " ".join(parts)

    def tensor(self, tensor: Tensor | None) -> str:
        """Its layout, and which of the model's tensors it is, as weights may be tied."""
        if tensor is None:
            return "none"
        number = self.tensors.setdefault(id(tensor), len(self.tensors))
        layout = f"{tuple(tensor.shape)} {tensor.dtype} {tensor.stride()} {tensor.device.type}{sharding_text(tensor)}"
        return f"#{number} {layout}"

    def value(self, value: Any, name: str, depth: int) -> str:
        """A value as text."""
        if type(value) in _PLAIN:
            return repr(value)
        if (known := self.objects.get(id(value))) is not None:
            return known
        if isinstance(value, (bool, int, float, complex, str, bytes)):
            return repr(value)
        if isinstance(value, (torch.dtype, torch.device, torch.Size, enum.Enum)):
            return repr(value)
        if isinstance(value, Tensor):
            return self.tensor(value)
        if is_mesh(value):
            return mesh_text(value)
        if is_placement(value):
            return repr(value)
        if isinstance(value, nn.Module):
            return f"module {self.modules.get(id(value), type(value).__qualname__)}"
        if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)):
            return self.function(value, name)
        if depth > _DEEPEST:
            raise NotStorableError(f"the attribute {name} holds objects too deep in each other")
        self.objects[id(value)] = f"object {len(self.objects)}"  # what refers back to it from inside
        self.kept.append(value)
        text = self.container(value, name, depth + 1)
        self.objects[id(value)] = text if len(text) <= 256 else hashlib.sha256(text.encode()).hexdigest()
        return self.objects[id(value)]

    def container(self, value: Any, name: str, depth: int) -> str:
        if isinstance(value, (list, tuple)):
            return f"{type(value).__name__}({', '.join(self.value(item, name, depth) for item in value)})"
        if isinstance(value, (set, frozenset)):
            return f"set({', '.join(sorted(self.value(item, name, depth) for item in value))})"
        if isinstance(value, dict):
            items = [
                f"{self.value(key, name, depth)}: {self.value(item, f'{name}[{key!r}]', depth)}"
                for key, item in value.items()
            ]
            return f"dict({', '.join(sorted(items))})"
        if isinstance(value, functools.partial):
            return f"partial{self.value((value.func, value.args, value.keywords), name, depth)}"
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict):
            raise NotStorableError(f"the attribute {name} is a {type(value).__name__}, which can't be described")
        inside = [f"{k}:{self.value(v, f'{name}.{k}', depth)}" for k, v in attributes.items() if k not in self.skip]
        return f"{self.function(type(value), name)}({', '.join(sorted(inside))})"

    def function(self, value: Any, name: str) -> str:
        """A function or class: by name where that finds it, otherwise by its code."""
        bound = getattr(value, "__self__", None)
        owner = f"{self.value(bound, name, 1)}." if isinstance(bound, nn.Module) else ""
        title = f"{owner}{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
        if "<" not in title:
            return title
        code = getattr(value, "__code__", None)
        if code is None:
            raise NotStorableError(f"{name} is {title}, which another process can't find")
        cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        constants = tuple(item for item in code.co_consts if not isinstance(item, types.CodeType))
        text = (code.co_code.hex(), repr(constants), code.co_names, self.value(cells, name, 1))
        return f"{title} {hashlib.sha256(repr(text).encode()).hexdigest()}"
