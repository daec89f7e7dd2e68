"""A model's structure as text that is equal in every process: everything its forward can read except weights' values.

Kinds compare layers of one model in one process and may use identity. A stored program must recognise its model in
another process. If part of a model has no description that holds there, the model is not storable.
"""

from __future__ import annotations

import enum
import functools
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
    """SHA-256, in hex, of everything about a model that its forward can read except weights' values.

    Args:
        model: the model.
        skip: names of attributes, of modules or of the objects in them, that no forward reads.
        followed: modules whose own forward runs at every call, so that no program depends on their content.

    Raises:
        NotStorableError: part of the model can't be described; the message names it.
    """
    describer, own = _PortableDescriber(model, skip=frozenset(skip)), set(map(id, followed))
    lines = [
        f"{path}: {describer.module(path, part, followed=id(part) in own)}" for path, part in model.named_modules()
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _PortableDescriber(Describer):
    """Describes objects by names that another process can look up, and refuses objects without such a name."""

    by_identity = False

    def __init__(self, model: nn.Module, skip: frozenset[str]) -> None:
        super().__init__(model, skip=skip)
        self._classes: dict[type, str] = {}
        self._tensors: dict[int, int] = {}
        self._trail: list[str] = []

    def module(self, path: str, module: nn.Module, *, followed: bool) -> str:
        cls, table = type(module), module.__dict__
        if hooks_of(module):
            raise NotStorableError(f"{path or 'the model'} has hooks")
        if cls not in self._classes:
            self._classes[cls] = self.named(cls) + self._methods(cls)
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
        """A class by its qualified name, an enum member by its repr."""
        if isinstance(value, type):
            title = f"{value.__module__}.{value.__qualname__}"
            if "<" not in title:
                return title
            raise NotStorableError(f"{self._what()} is {title}, which another process can't find")
        return repr(value) if isinstance(value, enum.Enum) else self.unknown(value)

    def unknown(self, value: Any) -> str:
        """Refuse: the object has no description that holds in another process."""
        raise NotStorableError(f"{self._what()} is a {type(value).__name__}, which can't be described")

    def tensor(self, tensor: Tensor) -> str:
        """Describe a tensor's layout, with a number that shows which weights are tied."""
        number = self._tensors.setdefault(id(tensor), len(self._tensors))
        layout = f"{tuple(tensor.shape)} {tensor.dtype} {tensor.stride()} {tensor.device.type}{sharding_text(tensor)}"
        inner = inner_text(tensor)
        if " at 0x" in inner:
            raise NotStorableError(f"a weight is a {type(tensor).__qualname__}, which can't be described")
        return f"#{number} {layout}" + (f" {self.named(type(tensor))}{inner}" if inner else "")

    def function(self, function: types.FunctionType) -> str:
        """A function by its name if its file defines it there, otherwise by its code and environment."""
        title = f"{function.__module__}.{function.__qualname__}"
        if _is_as_defined(function):
            return title
        return f"{title} {code_text(function.__code__)} {self.environment(function)}"

    def attribute(self, name: str, value: Any) -> str:
        """See `Describer`. The names lead to the attribute that an error names."""
        self._trail.append(name)
        text = super().attribute(name, value)
        self._trail.pop()
        return text

    def arrange(self, texts: list[str]) -> list[str]:
        """Sort the items, because the order of sets differs between processes."""
        return sorted(texts)

    def _what(self) -> str:
        return f"the attribute {'.'.join(self._trail)}" if self._trail else "a module"

    def _methods(self, cls: type) -> str:
        """Describe the code of a class's methods. They may be wrapped, replaced, or older than their file is now."""
        parts = []
        for base in cls.__mro__:
            for name, value in vars(base).items() if not base.__module__.startswith(_KNOWN) else ():
                function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if isinstance(function, types.FunctionType):
                    as_defined = _is_as_defined(function)
                    text = code_text(function.__code__) if as_defined else self.attribute(name, function)
                    parts.append(f" {base.__qualname__}.{name}={text}")
        return "".join(parts)


def _is_as_defined(function: types.FunctionType) -> bool:
    """Whether a function's name leads to it and its file defines it there, so that it neither is wrapped nor replaces
    another function."""
    at: Any = sys.modules.get(function.__module__)
    if getattr(at, "__dict__", None) is not function.__globals__ or function.__closure__ or vars(function):
        return False
    if function.__code__.co_qualname != function.__qualname__:
        return False
    for part in function.__qualname__.split("."):
        at = getattr(at, "__dict__", {}).get(part)
    at = getattr(at, "__func__", at)  # of a static or class method
    file = vars(sys.modules[function.__module__]).get("__file__")
    return at is function and function.__code__.co_filename == file


@functools.lru_cache(maxsize=4096)
def code_text(code: types.CodeType) -> str:
    """Hash a function's code. The hash is equal in every process with the same version of Python."""
    constants = [code_text(item) if isinstance(item, types.CodeType) else _constant(item) for item in code.co_consts]
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    text = (code.co_code.hex(), code.co_exceptiontable.hex(), constants, names, code.co_argcount, code.co_flags)
    return hashlib.sha256(repr(text).encode()).hexdigest()


def _constant(item: Any) -> str:
    return f"frozenset {sorted(map(repr, item))}" if isinstance(item, frozenset) else repr(item)
