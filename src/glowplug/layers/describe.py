"""Values that layers hold, as text that is equal where they do the same in both layers.

Plain values go by content, and so does what is made of them: containers, functions and what their cells and defaults
hold, partials, bound methods, objects of Python classes. Anything else goes by identity.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import itertools
import types
import weakref
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from glowplug.layers.registry import MARKS
from glowplug.layers.shards import is_mesh, is_placement, mesh_text, sharding_text

PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device})
PRINTED = frozenset({"extra_repr", "_get_name", "__repr__", "__str__"})
"""Attributes that only print a module; no forward reads them."""
_BY_IDENTITY = (type, types.ModuleType, enum.Enum, types.CodeType)
_CONTAINERS = (list, tuple, set, frozenset, dict, deque, types.MappingProxyType)
_LONGEST = 200
_LARGEST = 2000
"""Objects that one value may hold, at most: what holds more goes by identity."""
_POINTER = object.__basicsize__ // 2


class _TooLarge(Exception):
    """A value holds more objects than is worth looking at."""


class Describer:
    """Describes what the modules of one layer hold.

    Args:
        layer: the layer. What refers to a module of it is described by that module's place in it.
        model: ids of the modules of the whole model: those that lie outside of the layer go by identity.
        known: id of an object that refers to nothing of its layer -> the object, and its text. Shared by the layers.
    """

    def __init__(
        self, layer: nn.Module, model: Collection[int] = (), known: dict[int, tuple[Any, str]] | None = None
    ) -> None:
        self._places = {id(module): path for path, module in layer.named_modules()}
        self._model = model
        self._known: dict[int, tuple[Any, str]] = known if known is not None else {}
        self._mine: dict[int, tuple[Any, str]] = {}
        self._open: dict[int, int] = {}
        self._lowest = _LARGEST
        self._relative = False
        self._count = 0

    def text(self, value: Any) -> str:
        """A value as text. Equal texts mean: the same to any code that reads it, of its own layer each."""
        if type(value) in PLAIN:
            return repr(value)
        if not self._open:
            self._count, self._lowest = 0, _LARGEST
            try:
                return self._look(value)
            except _TooLarge:
                self._open.clear()
                self._known[id(value)] = value, _identity(value)
        return self._look(value)

    def _look(self, value: Any) -> str:
        """The text of an object; one that is being described already, further out, by how far out."""
        key = id(value)
        for table in (self._known, self._mine):
            if key in table:
                self._relative |= table is self._mine
                return table[key][1]
        if key in self._places:
            self._relative = True
            return f"its own module {self._places[key]!r}"
        level = len(self._open)
        if key in self._open:
            self._lowest = min(self._lowest, self._open[key])
            return f"what holds it, {level - self._open[key]} up"
        self._count += 1
        if self._count > _LARGEST or level > 60:
            raise _TooLarge
        outer, self._lowest, self._relative = (self._lowest, self._relative), _LARGEST, False
        self._open[key] = level
        text = self._content(value)
        del self._open[key]
        if len(text) > _LONGEST:
            text = f"{type(value).__qualname__} {hashlib.sha256(text.encode()).hexdigest()}"
        if self._lowest >= level:  # it refers to nothing that holds it
            (self._mine if self._relative else self._known)[key] = value, text
            self._lowest = _LARGEST
        self._lowest, self._relative = min(outer[0], self._lowest), outer[1] or self._relative
        return text

    def _all(self, *values: Any) -> str:
        return ", ".join(map(self.text, values))

    def _content(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):  # a program can't bind it, as no attribute of a module holds it
            return f"tensor {id(value)} {layout_text(value)}"
        if isinstance(value, nn.Module):
            return _identity(value) if id(value) in self._model else self._object(value, ())
        if isinstance(value, _BY_IDENTITY):
            return _identity(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return f"method {self._all(value.__func__, value.__self__)}"
        if isinstance(value, types.BuiltinFunctionType):
            return f"builtin {value.__qualname__} of {self.text(value.__self__)}"
        if isinstance(value, functools.partial):
            return f"{_class(value)} {self._all(value.func, value.args, value.keywords, vars(value))}"
        if isinstance(value, weakref.ref):
            return f"reference {self.text(value())}"
        if hasattr(value, "cache_parameters") and hasattr(value, "__wrapped__"):  # functools.lru_cache
            return f"cached {self._all(value.__wrapped__, value.cache_parameters())}"
        if is_mesh(value):
            return mesh_text(value)
        if is_placement(value):
            return repr(value)
        if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
            held = f"{value.dtype} {value.shape} {value.strides} {value.flags.writeable}"
            return f"{_class(value)} {held} {hashlib.sha256(value.tobytes()).hexdigest()}"
        return self._container(value)

    def _container(self, value: Any) -> str:
        """Containers in the order in which a loop meets what they hold."""
        if isinstance(value, (bool, int, float, complex, str, bytes, bytearray)):
            base: Any = next(base for base in type(value).__mro__ if base in PLAIN or base is bytearray)
            plain = base(value)
            return self._object(value, (bytes(plain) if base is bytearray else plain,))
        if isinstance(value, (list, tuple, set, frozenset)):
            return self._object(value, tuple(value))
        if isinstance(value, deque):
            return self._object(value, (value.maxlen, *value))
        if isinstance(value, (dict, types.MappingProxyType)):
            default = getattr(value, "default_factory", None)
            return self._object(value, (default, *itertools.chain.from_iterable(value.items())))
        return self._object(value, ()) if _is_transparent(type(value)) else _identity(value)

    def _object(self, value: Any, items: tuple[Any, ...]) -> str:
        """An object by its class, what it holds as a container, and its attributes."""
        attributes = attributes_of(value) or {}
        kept = [f"{name}={self.text(held)}" for name, held in attributes.items() if name not in MARKS]
        if not (items or kept or callable(value) or isinstance(value, _CONTAINERS)):
            return _identity(value)  # all that code can do with it is to ask whether it is another
        return f"{_class(value)}({', '.join([*map(self.text, items), *kept])})"

    def _function(self, function: types.FunctionType) -> str:
        cells = [held_by(cell) for cell in function.__closure__ or ()]
        held = self._all(function.__defaults__, function.__kwdefaults__, vars(function), *cells)
        return f"{function.__qualname__} {id(function.__code__)} {id(function.__globals__)} {held}"


def held_by(cell: types.CellType) -> Any:
    """What a function's cell holds; a text when it holds nothing yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return "nothing yet"


def attributes_of(value: Any) -> dict[str, Any] | None:
    """An object's attributes, those in slots too; None when it can't have any."""
    attributes = getattr(value, "__dict__", None)
    found = dict(attributes) if isinstance(attributes, dict) else None
    for base in type(value).__mro__:
        for name, slot in _slots(base).items():
            found = found if found is not None else {}
            try:
                found[name] = slot.__get__(value, type(value))
            except AttributeError:
                continue  # nothing yet
    return found


def _identity(value: Any) -> str:
    return f"{type(value).__qualname__} {id(value)}"


def _class(value: Any) -> str:
    return f"{type(value).__qualname__} {id(type(value))}"


def _is_python(cls: type) -> bool:
    return bool(cls.__flags__ & 1 << 9)  # made by a class statement


def _slots(cls: type) -> dict[str, types.MemberDescriptorType]:
    if not _is_python(cls):
        return {}
    return {name: slot for name, slot in vars(cls).items() if isinstance(slot, types.MemberDescriptorType)}


def _is_transparent(cls: type) -> bool:
    """Whether attributes and slots are all that an object of a class holds, as far as its size in memory tells."""
    bases = [base for base in cls.__mro__ if base is not object]
    if cls.__itemsize__ or not all(_is_python(base) or base is types.SimpleNamespace for base in bases):
        return False
    slots = sum(len(_slots(base)) for base in bases)
    extra = (cls.__dictoffset__ > 0) + (cls.__weakrefoffset__ > 0)
    return cls.__basicsize__ == object.__basicsize__ + _POINTER * (slots + extra)


def layout_text(tensor: torch.Tensor | None) -> str:
    """A tensor but for its values; one that is made of others with theirs."""
    if tensor is None:
        return "none"
    form = tensor.stride() if tensor.layout is torch.strided else tensor.layout
    text = f"{tuple(tensor.shape)} {tensor.dtype} {form} {tensor.device} {tensor.requires_grad}"
    return f"{text} {type(tensor)}{sharding_text(tensor)}{inner_text(tensor)}"


def inner_text(tensor: torch.Tensor) -> str:
    """The tensors that one of a subclass is made of, but for their values, and what it says of them; else empty."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or sharding_text(tensor):
        return ""
    names, context = flatten()
    inner = ", ".join(
        f"{name}: {tuple(held.shape)} {held.dtype} {held.stride()} {type(held).__qualname__}{inner_text(held)}"
        for name in names
        if isinstance(held := getattr(tensor, name), torch.Tensor)
    )
    return f" of {inner} {context!r}"


def shown(value: Any) -> str:
    """A value as a person reads it: without addresses, and short."""
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
        held = dict(zip(value.__code__.co_freevars, map(held_by, value.__closure__ or ()), strict=True))
        held |= {"its defaults": value.__defaults__} if value.__defaults__ else {}
        held |= value.__kwdefaults__ or {}
        inside = ", ".join(f"{name}={inner(item)}" for name, item in held.items())
        name = value.__qualname__.replace("<locals>.", "").replace("<lambda>", "lambda")
        return f"{name}{f' with {inside}' if inside else ''}"
    attributes = attributes_of(value)
    if attributes is not None and not isinstance(value, nn.Module):
        inside = ", ".join(f"{name}={inner(item)}" for name, item in itertools.islice(attributes.items(), 8))
        return f"{type(value).__qualname__}({inside})"
    return str(getattr(value, "__qualname__", f"a {type(value).__qualname__}"))
