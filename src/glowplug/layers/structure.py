"""A model's structure as text that is equal in every process: what its forward can read, but for the weights' values.

Kinds compare layers of one model in one process, and may go by identity; a stored program must be told that this model
is the very one it was made for. What has no description that holds in another process makes a model not storable.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import sys
import types
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from glowplug.errors import NotStorableError
from glowplug.layers.describe import PRINTED, attributes_of, held_by, inner_text
from glowplug.layers.registry import MARKS
from glowplug.layers.shards import is_mesh, is_placement, mesh_text, sharding_text, wrapped_forward
from glowplug.layers.watch import without_inert

_STANDARD = frozenset(nn.Module().__dict__) | MARKS | PRINTED
"""Attributes that every module has, those that matter being described on their own; and those that only print it."""
_HOOKS = tuple(name for name in nn.Module().__dict__ if name.endswith("_hooks") and "backward" not in name)
_KNOWN = ("torch.", "builtins", "transformers.modeling_utils", "transformers.generation")
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
            self.classes[cls] = self.function(cls, "a module") + self.methods(cls)
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

    def methods(self, cls: type) -> str:
        """The code of a class's methods: wrapped, or put in the place of others, or older than their file is now."""
        parts = []
        for base in cls.__mro__:
            for name, held in vars(base).items() if not base.__module__.startswith(_KNOWN) else ():
                function = held.fget if isinstance(held, property) else held
                function = function.__func__ if isinstance(function, (staticmethod, classmethod)) else function
                if isinstance(function, types.FunctionType):
                    text = code_text(function.__code__) if _is_as_made(function) else self.value(function, name, 0)
                    parts.append(f" {base.__qualname__}.{name}={text}")
        return "".join(parts)

    def tensor(self, tensor: Tensor | None) -> str:
        """Its layout, and which of the model's tensors it is, as weights may be tied."""
        if tensor is None:
            return "none"
        number = self.tensors.setdefault(id(tensor), len(self.tensors))
        layout = f"{tuple(tensor.shape)} {tensor.dtype} {tensor.stride()} {tensor.device.type}{sharding_text(tensor)}"
        if inner := inner_text(tensor):
            layout += f" {self.function(type(tensor), 'a weight')}{inner}"
            if " at 0x" in inner:
                raise NotStorableError(f"a weight is a {type(tensor).__qualname__}, which can't be described")
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
        if id(value) in self.modules:
            return f"module {self.modules[id(value)]}"
        if isinstance(value, (type, types.BuiltinFunctionType)):
            return self.function(value, name)
        if depth > _DEEPEST:
            raise NotStorableError(f"the attribute {name} holds objects too deep in each other")
        self.objects[id(value)] = f"object {len(self.objects)}"  # what refers back to it from inside
        self.kept.append(value)
        text = self.container(value, name, depth + 1)
        self.objects[id(value)] = text if len(text) <= 256 else hashlib.sha256(text.encode()).hexdigest()
        return self.objects[id(value)]

    def container(self, value: Any, name: str, depth: int) -> str:
        if isinstance(value, (types.FunctionType, types.MethodType)):
            return self.function(value, name, depth)
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
        attributes = attributes_of(value)
        if attributes is None:
            raise NotStorableError(f"the attribute {name} is a {type(value).__name__}, which can't be described")
        inside = [f"{k}:{self.value(v, f'{name}.{k}', depth)}" for k, v in attributes.items() if k not in self.skip]
        return f"{self.function(type(value), name)}({', '.join(sorted(inside))})"

    def function(self, value: Any, name: str, depth: int = 1) -> str:
        """A function or class: by name where that finds it as its file made it, otherwise by what it holds."""
        if isinstance(value, types.MethodType):
            return f"method {self.value(value.__func__, name, depth)} of {self.value(value.__self__, name, depth)}"
        title = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
        if isinstance(value, types.FunctionType):
            if _is_as_made(value):
                return title
            held = [held_by(cell) for cell in value.__closure__ or ()]
            inside = [value.__defaults__, value.__kwdefaults__, vars(value), held]
            return f"{title} {code_text(value.__code__)} {self.value(inside, name, depth)}"
        owner = getattr(value, "__self__", None)
        if owner is not None and not isinstance(owner, (types.ModuleType, type)):
            title = f"{self.value(owner, name, 1)}.{title}"
        elif "<" in title:
            raise NotStorableError(f"{name} is {title}, which another process can't find")
        return title


def _is_as_made(function: types.FunctionType) -> bool:
    """Whether a function is found by its name, and is the one that its file defines there: neither wrapped nor put in
    the place of another."""
    found: Any = sys.modules.get(function.__module__)
    if getattr(found, "__dict__", None) is not function.__globals__ or function.__closure__ or vars(function):
        return False
    if function.__code__.co_qualname != function.__qualname__:
        return False
    for part in function.__qualname__.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    found = getattr(found, "__func__", found)  # of a static or class method
    file = vars(sys.modules[function.__module__]).get("__file__")
    return found is function and function.__code__.co_filename == file


@functools.lru_cache(maxsize=4096)
def code_text(code: types.CodeType) -> str:
    """A function's code, hashed: equal in every process of one Python where it does the same."""
    constants = [code_text(item) if isinstance(item, types.CodeType) else _constant(item) for item in code.co_consts]
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    text = (code.co_code.hex(), code.co_exceptiontable.hex(), constants, names, code.co_argcount, code.co_flags)
    return hashlib.sha256(repr(text).encode()).hexdigest()


def _constant(item: Any) -> str:
    return f"frozenset {sorted(map(repr, item))}" if isinstance(item, frozenset) else repr(item)
