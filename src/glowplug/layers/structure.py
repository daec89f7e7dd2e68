"""A model's structure as text that is equal in every process: what its forward can read, but for the weights' values.

Kinds compare layers of one model in one process, and may go by identity; a stored program must be told that this model
is the very one it was made for. What has no description that holds in another process makes a model not storable.
"""

from __future__ import annotations

import enum
import hashlib
import sys
import types
from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, nn

from glowplug.errors import NotStorableError
from glowplug.layers.describe import Describer, inner_text
from glowplug.layers.reads import PRINTED, attributes_read, hooks_of
from glowplug.layers.shards import sharding_text, wrapped_forward

_KNOWN = ("torch.", "builtins", "transformers.modeling_utils", "transformers.generation")


def structure_of(model: nn.Module, skip: Collection[str] = (), followed: Iterable[nn.Module] = ()) -> str:
    """SHA-256, in hex, of everything about a model that its forward can read, but for the weights' values.

    Args:
        model: the model.
        skip: names of attributes, of modules or of objects that they hold, that no forward reads.
        followed: modules whose own forward runs at every call, so that no program depends on what they hold.

    Raises:
        NotStorableError: something about it can't be described; the message names it.
    """
    describer, passed = _Addresses(model, skip=frozenset(skip)), set(map(id, followed))
    lines = [
        f"{path}: {describer.module(path, module, followed=id(module) in passed)}"
        for path, module in model.named_modules()
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Addresses(Describer):
    """Describes what has a name by it, where that finds it in another process; refuses what has none."""

    by_identity = False

    def __init__(self, model: nn.Module, skip: frozenset[str]) -> None:
        super().__init__(model, skip=skip)
        self._classes: dict[type, str] = {}
        self._tensors: dict[int, int] = {}
        self._trail: list[str] = []

    def module(self, path: str, module: nn.Module, *, followed: bool) -> str:
        """A module of the model."""
        cls, table = type(module), module.__dict__
        if hooks_of(module):
            raise NotStorableError(f"{path or 'the model'} has hooks")
        if cls not in self._classes:
            self._classes[cls] = self.named(cls) + self._replaced(cls)
        parts = [self._classes[cls], str(module.training)]
        if followed:
            return " ".join([*parts, "followed"])
        for name, tensor in (*table["_parameters"].items(), *table["_buffers"].items()):
            parts.append(f"{name}={self.tensor(tensor) if tensor is not None else 'none'}")
        parts += [f"{name}->{self._places.get(id(child))!r}" for name, child in table["_modules"].items()]
        for name, value in attributes_read(module, PRINTED | set(self._skip)):
            if name == "forward" and not path:
                continue
            if name == "forward" and wrapped_forward(module) is None:
                raise NotStorableError(f"the forward of {path} was replaced")
            parts.append(self.attribute(name, value))
        return " ".join(parts)

    def named(self, value: Any) -> str:
        """See `Describer`."""
        if isinstance(value, type):
            title = f"{value.__module__}.{value.__qualname__}"
            if "<" not in title:
                return title
            raise NotStorableError(f"{self._what()} is {title}, which another process can't find")
        return repr(value) if isinstance(value, enum.Enum) else self.unknown(value)

    def unknown(self, value: Any) -> str:
        """See `Describer`."""
        raise NotStorableError(f"{self._what()} is a {type(value).__name__}, which can't be described")

    def tensor(self, tensor: Tensor) -> str:
        """Its layout, and which of the model's tensors it is, as weights may be tied."""
        number = self._tensors.setdefault(id(tensor), len(self._tensors))
        layout = f"{tuple(tensor.shape)} {tensor.dtype} {tensor.stride()} {tensor.device.type}{sharding_text(tensor)}"
        inner = inner_text(tensor)
        if " at 0x" in inner:
            raise NotStorableError(f"a weight is a {type(tensor).__qualname__}, which can't be described")
        return f"#{number} {layout}" + (f" {self.named(type(tensor))}{inner}" if inner else "")

    def function(self, function: types.FunctionType) -> str:
        """By name where that finds it as its file made it, otherwise by its code and what it holds."""
        title = f"{function.__module__}.{function.__qualname__}"
        return title if _is_as_made(function) else f"{title} {_code_text(function.__code__)} {self.held(function)}"

    def attribute(self, name: str, value: Any) -> str:
        """See `Describer`."""
        self._trail.append(name)
        text = super().attribute(name, value)
        self._trail.pop()
        return text

    def arrange(self, texts: list[str]) -> list[str]:
        """See `Describer`. Processes differ in the order of sets."""
        return sorted(texts)

    def _what(self) -> str:
        return f"the attribute {'.'.join(self._trail)}" if self._trail else "a module"

    def _replaced(self, cls: type) -> str:
        """The methods of a class that are not as its file defines them: wrapped, or put in the place of another."""
        return "".join(
            f" {base.__qualname__}.{self.attribute(name, function)}"
            for base in cls.__mro__
            if not base.__module__.startswith(_KNOWN)
            for name, function in vars(base).items()
            if isinstance(function, types.FunctionType) and not _is_as_made(function)
        )


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


def _code_text(code: types.CodeType) -> str:
    """A function's code, hashed: equal in every process of one Python where it does the same."""
    constants = [_code_text(item) if isinstance(item, types.CodeType) else _constant(item) for item in code.co_consts]
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    text = (code.co_code.hex(), code.co_exceptiontable.hex(), constants, names, code.co_argcount, code.co_flags)
    return hashlib.sha256(repr(text).encode()).hexdigest()


def _constant(item: Any) -> str:
    return f"frozenset {sorted(map(repr, item))}" if isinstance(item, frozenset) else repr(item)
