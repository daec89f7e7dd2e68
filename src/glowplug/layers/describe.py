"""Describes values that modules hold as text. Values with equal texts behave the same.

Plain values are described by content, and so are values composed of them: containers, functions with their cells and
defaults, partials, bound methods, objects of Python classes. `Describer` describes anything else by identity, which is
valid in one process only. `glowplug.layers.structure` needs texts that hold in every process, and refuses it.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import itertools
import re
import types
import weakref
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from glowplug.layers.reads import MARKS
from glowplug.layers.shards import placing_text, sharding_text

PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device})
_CONTAINERS = (list, tuple, set, frozenset, dict, deque, types.MappingProxyType)
_LONGEST = 200
_LARGEST = 2000
"""The most objects that one value may hold; a larger value is described by identity."""
_DEEPEST = 60
_POINTER = object.__basicsize__ // 2


class _TooLarge(Exception):
    """A value holds more than `_LARGEST` objects."""


class Describer:
    """Describes what the modules below a root hold.

    Args:
        root: a module, such as a layer. References to modules below it are described by their path in it.
        model: ids of the whole model's modules; those outside the root are described by identity.
        known: id of an object -> the object and its text, for objects that refer to nothing below the root.
            Describers may share it.
        skip: names of attributes to leave out.
        own: the root's qualified name in the model. Given one, strings that contain it are described relative to it,
            and tensors and objects without content by their form and not their identity: for a front end that binds
            tensors wherever they are, and compares every layer with eager.
        shared: classes of objects that all layers share, to be described by identity.
    """

    by_identity = True
    """Whether an object without content is described by identity."""

    def __init__(
        self,
        root: nn.Module,
        model: Collection[int] = (),
        known: dict[int, tuple[Any, str]] | None = None,
        skip: Collection[str] = MARKS,
        own: str = "",
        shared: tuple[type, ...] = (),
    ) -> None:
        self._places = {id(module): path for path, module in root.named_modules()}
        self._model = model
        self._skip = skip
        self._shared = shared
        self._own = re.compile(rf"(?<![^.]){re.escape(own)}(?![^.])") if own else None
        self._known: dict[int, tuple[Any, str]] = known if known is not None else {}
        self._mine: dict[int, tuple[Any, str]] = {}
        self._open: dict[int, int] = {}
        self._lowest = _LARGEST
        self._relative = False
        self._count = 0

    def text(self, value: Any) -> str:
        """A value as text. Code below the root can't tell values with equal texts apart."""
        if type(value) in PLAIN:
            relative = self._own is not None and type(value) is str
            return repr(self._own.sub("<layer>", value)) if relative else repr(value)  # type: ignore[union-attr]
        if not self._open:
            self._count, self._lowest = 0, _LARGEST
            try:
                return self._look(value)
            except _TooLarge:
                self._open.clear()
                self._known[id(value)] = value, self.unknown(value)
        return self._look(value)

    # -- overridden for descriptions that must hold in every process -------------------------------------------

    def named(self, value: Any) -> str:
        """Describe a class, an enum member, a Python module or a code object, without looking inside."""
        return _identity(value)

    def unknown(self, value: Any) -> str:
        """Describe an object whose content can't be read."""
        return _identity(value)

    def tensor(self, tensor: torch.Tensor) -> str:
        """Describe a tensor that is no module's attribute. If a program can't bind it, its identity counts."""
        return f"tensor {'' if self._own is not None else id(tensor)} {layout_text(tensor)}"

    def function(self, function: types.FunctionType) -> str:
        """Describe a function by its code and its environment."""
        compiled = getattr(function, "_torchdynamo_orig_callable", None)
        if compiled is not None:  # a trace looks through `torch.compile`
            return f"compiled {self.text(compiled)}"
        text = self.environment(function)
        return f"{function.__qualname__} {id(function.__code__)} {id(function.__globals__)} {text}"

    def attribute(self, name: str, value: Any) -> str:
        """Describe an attribute of an object."""
        return f"{name}={self.text(value)}"

    def arrange(self, texts: list[str]) -> list[str]:
        """Order the items of an unordered container. Within one process, iteration order is what code sees."""
        return texts

    # -- looking into values -----------------------------------------------------------------------------------

    def environment(self, function: types.FunctionType) -> str:
        """Describe what a function holds besides its code: defaults, attributes and cells."""
        cells = [cell_content(cell) for cell in function.__closure__ or ()]
        return self._all(function.__defaults__, function.__kwdefaults__, vars(function), *cells)

    def _look(self, value: Any) -> str:
        """Describe an object. One that encloses the current object is described by its distance outwards."""
        key = id(value)
        for table in (self._known, self._mine):
            if key in table:
                self._relative |= table is self._mine
                return table[key][1]
        if key in self._places:
            self._relative = True
            return f"its own module {self._places[key]!r}"
        if isinstance(value, self._shared):
            return _identity(value)
        level = len(self._open)
        if key in self._open:
            self._lowest = min(self._lowest, self._open[key])
            return f"what holds it, {level - self._open[key]} up"
        self._count += 1
        if self._count > _LARGEST or level > _DEEPEST:
            raise _TooLarge
        outer, self._lowest, self._relative = (self._lowest, self._relative), _LARGEST, False
        self._open[key] = level
        text = self._content(value)
        del self._open[key]
        if len(text) > _LONGEST:
            text = f"{type(value).__qualname__} {hashlib.sha256(text.encode()).hexdigest()}"
        if self._lowest >= level:  # no reference to an enclosing object
            (self._mine if self._relative else self._known)[key] = value, text
            self._lowest = _LARGEST
        self._lowest, self._relative = min(outer[0], self._lowest), outer[1] or self._relative
        return text

    def _all(self, *values: Any) -> str:
        return ", ".join(map(self.text, values))

    def _content(self, value: Any) -> str:
        match value:
            case torch.Tensor():
                return self.tensor(value)
            case nn.Module() if id(value) in self._model:
                self._relative = True  # from another root it may be one below the root
                return _identity(value)
            case nn.Module():
                return self._object(value, [])
            case type() | types.ModuleType() | enum.Enum() | types.CodeType():
                return self.named(value)
            case types.FunctionType():
                return self.function(value)
            case types.MethodType():
                return f"method {self._all(value.__func__, value.__self__)}"
            case types.BuiltinFunctionType():
                owner = value.__self__
                of = owner.__name__ if isinstance(owner, types.ModuleType) else self.text(owner)
                return f"builtin {value.__module__}.{value.__qualname__} of {of}"
            case functools.partial():
                return f"{self.named(type(value))} {self._all(value.func, value.args, value.keywords, vars(value))}"
            case weakref.ref():
                return f"reference {self.text(value())}"
        if hasattr(value, "cache_parameters") and hasattr(value, "__wrapped__"):  # functools.lru_cache
            return f"cached {self._all(value.__wrapped__, value.cache_parameters())}"
        placing = placing_text(value)
        if placing is not None:
            return placing
        if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
            layout = f"{value.dtype} {value.shape} {value.strides} {value.flags.writeable}"
            return f"{self.named(type(value))} {layout} {hashlib.sha256(value.tobytes()).hexdigest()}"
        return self._container(value)

    def _container(self, value: Any) -> str:
        match value:
            case bool() | int() | float() | complex() | str() | bytes() | bytearray():
                base: Any = next(base for base in type(value).__mro__ if base in PLAIN or base is bytearray)
                plain = base(value)
                return self._object(value, [repr(bytes(plain) if base is bytearray else plain)])
            case list() | tuple():
                return self._object(value, list(map(self.text, value)))
            case set() | frozenset():
                return self._object(value, self.arrange(list(map(self.text, value))))
            case deque():
                return self._object(value, list(map(self.text, (value.maxlen, *value))))
            case dict() | types.MappingProxyType():
                default = self.text(getattr(value, "default_factory", None))
                items = [f"{self.text(key)}: {self.text(item)}" for key, item in value.items()]
                return self._object(value, [default, *self.arrange(items)])
        return self._object(value, []) if _is_transparent(type(value)) else self.unknown(value)

    def _object(self, value: Any, items: list[str]) -> str:
        """Describe an object by its class, its items and its attributes."""
        attributes = attributes_of(value) or {}
        kept = self.arrange([self.attribute(name, item) for name, item in attributes.items() if name not in self._skip])
        if (
            self.by_identity
            and self._own is None
            and not (items or kept or callable(value) or isinstance(value, _CONTAINERS))
        ):
            return _identity(value)  # code can only compare it with another object
        return f"{self.named(type(value))}({', '.join([*items, *kept])})"


def cell_content(cell: types.CellType) -> Any:
    """The content of a function's cell, or a text if the cell is still empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return "nothing yet"


def attributes_of(value: Any) -> dict[str, Any] | None:
    """An object's attributes, including slots; None if it can't have any."""
    table = getattr(value, "__dict__", None)
    attributes = dict(table) if isinstance(table, dict) else None
    for base in type(value).__mro__:
        for name, slot in _slots(base).items():
            attributes = attributes if attributes is not None else {}
            try:
                attributes[name] = slot.__get__(value, type(value))
            except AttributeError:
                continue  # not set yet
    return attributes


def _identity(value: Any) -> str:
    return f"{type(value).__qualname__} {id(value)}"


def _is_python(cls: type) -> bool:
    return bool(cls.__flags__ & 1 << 9)  # a heap type: defined by a class statement


def _slots(cls: type) -> dict[str, types.MemberDescriptorType]:
    if not _is_python(cls):
        return {}
    return {name: slot for name, slot in vars(cls).items() if isinstance(slot, types.MemberDescriptorType)}


def _is_transparent(cls: type) -> bool:
    """Whether objects of a class hold nothing but attributes and slots, judging by their size in memory."""
    bases = [base for base in cls.__mro__ if base is not object]
    if cls.__itemsize__ or not all(_is_python(base) or base is types.SimpleNamespace for base in bases):
        return False
    slots = sum(len(_slots(base)) for base in bases)
    extra = (cls.__dictoffset__ > 0) + (cls.__weakrefoffset__ > 0)
    return cls.__basicsize__ == object.__basicsize__ + _POINTER * (slots + extra)


def layout_text(tensor: torch.Tensor | None) -> str:
    """Describe a tensor without its values, and for a tensor subclass its inner tensors."""
    if tensor is None:
        return "none"
    form = tensor.stride() if tensor.layout is torch.strided else tensor.layout
    text = f"{tuple(tensor.shape)} {tensor.dtype} {form} {tensor.device} {tensor.requires_grad}"
    return f"{text} {type(tensor)}{sharding_text(tensor)}{inner_text(tensor)}"


def inner_text(tensor: torch.Tensor) -> str:
    """Describe the inner tensors and the context of a tensor subclass, without values. Empty for a plain tensor."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or sharding_text(tensor):
        return ""
    names, context = flatten()
    inner = ", ".join(
        f"{name}: {tuple(part.shape)} {part.dtype} {part.stride()} {type(part).__qualname__}{inner_text(part)}"
        for name in names
        if isinstance(part := getattr(tensor, name), torch.Tensor)
    )
    return f" of {inner} {context!r}"


def shown(value: Any) -> str:
    """A value as short text for a person, without addresses."""
    return _shown(value, 3)[:100]


def _shown(value: Any, depth: int) -> str:
    if type(value) in PLAIN or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    if isinstance(value, enum.Enum):
        return str(value)
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, type):
        return value.__qualname__
    if depth == 0:
        return f"a {type(value).__qualname__}"

    def inner(item: Any) -> str:
        return _shown(item, depth - 1)

    if isinstance(value, (list, tuple, set, frozenset)):
        return f"{type(value).__qualname__}({', '.join(map(inner, itertools.islice(value, 8)))})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{inner(k)}: {inner(v)}" for k, v in itertools.islice(value.items(), 8)) + "}"
    if isinstance(value, functools.partial):
        return f"partial({', '.join([inner(value.func), *map(inner, value.args)])}, {inner(value.keywords)})"
    if isinstance(value, types.MethodType):
        return f"{inner(value.__func__)} of a {type(value.__self__).__qualname__}"
    if isinstance(value, types.FunctionType):
        environment = dict(zip(value.__code__.co_freevars, map(cell_content, value.__closure__ or ()), strict=True))
        environment |= {"its defaults": value.__defaults__} if value.__defaults__ else {}
        environment |= value.__kwdefaults__ or {}
        text = ", ".join(f"{name}={inner(item)}" for name, item in environment.items())
        name = value.__qualname__.replace("<locals>.", "").replace("<lambda>", "lambda")
        return f"{name}{f' with {text}' if text else ''}"
    attributes = attributes_of(value)
    if attributes is not None and not isinstance(value, nn.Module):
        text = ", ".join(f"{name}={inner(item)}" for name, item in itertools.islice(attributes.items(), 8))
        return f"{type(value).__qualname__}({text})"
    return str(getattr(value, "__qualname__", f"a {type(value).__qualname__}"))
