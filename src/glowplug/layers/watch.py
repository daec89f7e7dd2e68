"""Detects changes to a model after it was compiled: weights replaced, hooks added, modules swapped, flags set.

A program runs without its modules' Python code. So everything that this code read during the trace is recorded here
and compared at each call. In-place changes to a weight's values need no check, because programs hold the weights.
"""

from __future__ import annotations

import operator
import sys
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import nn

from glowplug.graph.sources import Access, Path, follow, parse
from glowplug.layers.reads import CALL_HOOKS, GLOBAL_HOOKS, MARKS, NOT_WATCHED, PRINTED, TABLES, is_own, without_inert
from glowplug.layers.shards import is_sharded, local_of

_TABLES = (*TABLES, *CALL_HOOKS)
_AROUND = ("_modules", *CALL_HOOKS)
"""The tables that a trace reads of a module whose own forward it does not trace."""
_ROOTS = frozenset({"model", "layer"})
"""Names of the parameter by which the traced functions get their module."""
_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)
"""Descriptors of attributes that are kept outside an object's `__dict__`: slots, a closure's cells, defaults."""
_CONTAINERS = frozenset({dict, OrderedDict, list, tuple, set})
_MISSING = object()
_Read = Literal["item", "attribute", "dict"]


@dataclass(slots=True)
class _Entry:
    """A watched value."""

    text: str  # the owner, for a person
    owner: Any  # the object with the attribute, the dict with the item, or the watched dict itself
    key: Any
    read: _Read
    whole: bool  # whether the content is watched if the value is a dict
    before: Any = None  # the value; a copy if it is a container whose content is watched
    is_open: bool = False  # whether it is such a container

    def now(self) -> Any:
        if self.read == "dict":
            return self.owner
        return self.owner.get(self.key, _MISSING) if self.read == "item" else getattr(self.owner, self.key, _MISSING)

    def take(self) -> None:
        now = self.now()
        self.is_open = type(now) in _CONTAINERS and (self.whole or not isinstance(now, dict))
        self.before = _freeze(now) if self.is_open else now

    def changed(self) -> bool:
        """Whether the value was replaced, or its content changed."""
        now, before = self.now(), self.before
        if self.key in CALL_HOOKS and self.read == "dict":
            return without_inert(now) != without_inert(before)
        if self.is_open or now is before:
            return not _equal(now, before)
        return type(before) is dict or type(now) is not type(before) or not _equal(now, before)  # 2 is not 2.0

    def __str__(self) -> str:
        key = self.key.strip("_").replace("_", " ") if self.read == "dict" else self.key
        return f"{key} of {self.text} changed"


@dataclass(frozen=True)
class _DistinctRead:
    """What a trace read.

    Attributes:
        source: its source.
        start: the last module of the tree on the way to it, or the Python module that it lies in; None if that is gone.
        path: the way from there.
        python_module: the name of the Python module; empty below the root.
    """

    source: str
    start: Any
    path: Path
    python_module: str = ""


def distinct_reads(model: nn.Module, reads: Iterable[str]) -> list[str]:
    """Those of a trace's reads of a model that a `Watch` needs, one for each attribute of a class of modules."""
    return [read.source for read in _distinct(model, set(map(id, model.modules())), reads)]


def _distinct(root: nn.Module, in_tree: set[int], reads: Iterable[str]) -> Iterator[_DistinctRead]:
    known: set[tuple[type, Path]] = set()
    for text in dict.fromkeys(reads):
        source = parse(text)
        if source is None or not source.path or source.size is not None:
            continue
        if source.is_global:
            if not is_own(source.root):
                yield _DistinctRead(text, sys.modules.get(source.root), source.path, source.root)
        elif source.root in _ROOTS:
            module, rest = _last_module(root, in_tree, source.path)
            unread = rest[0].name in NOT_WATCHED or rest[0].name in MARKS
            if unread or rest[0].name in _TABLES or (type(module), rest) in known:
                continue  # `Watch` watches the tables of the model's own modules as a whole
            known.add((type(module), rest))
            yield _DistinctRead(text, module, rest)


def _last_module(root: nn.Module, in_tree: set[int], path: Path) -> tuple[nn.Module, Path]:
    """The last module of the tree on a path, and the path from there."""
    module, start, at = root, 0, root
    for index, access in enumerate(path[:-1], 1):
        try:
            at = access.of(at)
        except Exception:  # a property may raise anything
            break
        if id(at) in in_tree:
            module, start = at, index
    return module, path[start:]


class ReadWatch:
    """A snapshot of what a trace read of some modules, and of the objects, classes and globals around them.

    Args:
        modules: the modules, by name.
        root: the traced module.
        reads: sources of what the trace read, such as `L['model']._modules['lm_head'].training`. An attribute read from
            one module is watched on every module of the same class.
    """

    def __init__(self, modules: Mapping[str, nn.Module], root: nn.Module, reads: Iterable[str]) -> None:
        self._modules = modules
        self._entries: dict[tuple[int, Any], _Entry] = {}
        self._descriptors: dict[tuple[type, str], bool] = {}
        self._namespaces: dict[type, Mapping[str, Any]] = {}
        self._in_tree = {id(module) for module in modules.values()}
        self._collect(root, reads)
        self._add_further()
        self._take()

    def change(self) -> str | None:
        """Describe what changed since the snapshot; None if nothing did, or if every change was undone."""
        if self._unchanged():
            return None
        changed = next((entry for entry in self._entries.values() if entry.changed()), None)
        if changed is None:
            self._take()
        return str(changed) if changed is not None else None

    # -- what is watched --------------------------------------------------------------------------------------

    def _collect(self, root: nn.Module, reads: Iterable[str]) -> None:
        of_class: dict[type, list[tuple[str, nn.Module]]] = {}
        for name, module in self._modules.items():
            of_class.setdefault(type(module), []).append((name, module))
        for read in _distinct(root, self._in_tree, reads):
            if not read.python_module:
                for name, other in of_class.get(type(read.start), [("", read.start)]):
                    self._add_at(name or "the model", other, read.path)
            elif read.start is not None:
                self._add_at(f"the module {read.python_module}", read.start, read.path)

    def _add_at(self, text: str, start: Any, path: Path) -> None:
        """Watch the value at a path: a list or tuple as a whole, a dict only at the item that was read, unless the
        trace read its keys."""
        kept = list(path)
        whole = kept[-1] != Access("call", "type")
        try:
            objects = follow(start, kept[:-1])
        except LookupError:
            return  # another module of the same class may not have it
        while kept and not (kept[-1].by == "attribute" or isinstance(objects[-1], dict)):
            kept.pop()
            objects.pop()
        for passed, access in zip(objects[:-1], kept, strict=False):
            if isinstance(passed, type) and access.by == "attribute":  # such as a property
                self._add(text, passed, access.name, whole=False)
        if not kept or kept[-1].name in NOT_WATCHED:
            return
        owner, name = objects[-1], kept[-1].name
        if kept[-1].by == "item":
            self._add_entry(f"{text}'s dict", owner, name)
            return
        if owner is not start and not isinstance(owner, (type, types.ModuleType)):
            text = f"the model's {type(owner).__name__}" if isinstance(start, nn.Module) else f"{text}'s object"
        self._add(text, owner, name, whole=whole)

    def _add(self, text: str, owner: Any, name: str, *, whole: bool = True) -> None:
        """Watch an attribute of an object, and with `whole` the content if it is a dict."""
        if isinstance(owner, type):
            base = next((base for base in owner.__mro__ if name in vars(base)), None)
            if base is not None and not is_own(base.__module__):
                table = self._namespaces.setdefault(base, vars(base))  # a new proxy each time
                self._add_entry(f"the class {base.__qualname__}", table, name, whole=whole)
        elif isinstance(owner, types.ModuleType):
            if not is_own(owner.__name__):
                self._add_entry(f"the module {owner.__name__}", vars(owner), name, whole=whole)
        elif self._has_descriptor(type(owner), name):
            self._add_entry(text, owner, name, "attribute")
        elif isinstance(getattr(owner, "__dict__", None), dict):
            self._add_entry(text, owner.__dict__, name, whole=whole)

    def _has_descriptor(self, cls: type, name: str) -> bool:
        """Whether objects of a class keep an attribute outside their `__dict__`."""
        if (cls, name) not in self._descriptors:
            member = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
            self._descriptors[cls, name] = isinstance(member, _DESCRIPTORS)
        return self._descriptors[cls, name]

    def _add_entry(self, text: str, owner: Any, key: Any, read: _Read = "item", *, whole: bool = True) -> None:
        entry = self._entries.get((id(owner), key))
        if entry is not None:
            entry.whole |= whole
        elif read != "item" or id(owner.get(key)) not in self._in_tree:
            self._entries[id(owner), key] = _Entry(text, owner, key, read, whole)

    def _add_further(self) -> None:
        """Watch more than the trace read; `Watch` overrides this."""

    # -- comparing, fast --------------------------------------------------------------------------------------

    def _take(self) -> None:
        """Take the snapshot. Values are grouped by their dict, so that one C call reads all watched items of a dict. A
        missing key can only appear if its dict grows, and values without watched content are compared by identity."""
        groups: dict[tuple[bool, int], list[_Entry]] = {}
        for entry in self._entries.values():
            entry.take()
            if entry.read == "item" and entry.key in entry.owner:
                groups.setdefault((entry.is_open, id(entry.owner)), []).append(entry)
        readers: tuple[list[_Reader], list[_Reader]] = ([], [])
        values: tuple[list[Any], list[Any]] = ([], [])
        for (is_open, _), group in groups.items():
            chosen = group if len(group) > 1 else group * 2  # for one key, itemgetter returns no tuple
            readers[is_open].append((operator.itemgetter(*[entry.key for entry in chosen]), chosen[0].owner))
            values[is_open].extend(entry.before for entry in chosen)
        (self._fixed, self._open), (self._fixed_values, self._open_values) = readers, values
        self._dicts = list({id(e.owner): e.owner for e in self._entries.values() if e.read == "item"}.values())
        self._sizes = list(map(len, self._dicts))
        self._live = [entry.owner for entry in self._entries.values() if entry.read == "dict"]
        self._copies = [entry.before for entry in self._entries.values() if entry.read == "dict"]
        self._attributes = [entry for entry in self._entries.values() if entry.read == "attribute"]

    def _unchanged(self) -> bool:
        """The fast check. True means that nothing changed; False means that each entry must be compared."""
        try:
            return (
                list(map(len, self._dicts)) == self._sizes
                and all(map(operator.is_, _read(self._fixed), self._fixed_values))
                and _equal([*_read(self._open)], self._open_values)
                and _equal(self._live, self._copies)
                and not any(entry.changed() for entry in self._attributes)
            )
        except KeyError:
            return False


_Reader = tuple[Any, Mapping[str, Any]]


def _read(readers: Sequence[_Reader]) -> Iterator[Any]:
    return chain.from_iterable([get(table) for get, table in readers])


class Watch(ReadWatch):
    """A snapshot of everything that a model's forward read during its trace, of its weights' layouts and its hooks.

    Args:
        model: the compiled model.
        reads: as for `ReadWatch`.
        followed: modules whose own forward runs at every call, behind an op, so that their content may change.
    """

    def __init__(self, model: nn.Module, reads: Iterable[str] = (), *, followed: Iterable[nn.Module] = ()) -> None:
        self._followed = set(map(id, followed))
        super().__init__(dict(model.named_modules()), model, reads)
        own = {id(t) for m in model.modules() if id(m) in self._followed for t in m.buffers(recurse=False)}
        self._tensors = list({id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in own}.values())
        self._layouts = [_layout(tensor) for tensor in self._tensors]
        self._sharded = any(map(is_sharded, self._tensors))
        self._pointers = self._read_pointers()

    def change(self) -> str | None:
        """Describe what changed since the snapshot; None if nothing did, or if every change was undone. Takes well
        under a microsecond per module.

        Replacing only a weight's storage (same shape, dtype, strides and device) is no change: programs hold the
        parameter object.
        """
        reason = super().change()
        pointers = self._read_pointers()
        if reason is None and pointers != self._pointers:
            for tensor, layout in zip(self._tensors, self._layouts, strict=True):
                if _layout(tensor) != layout:
                    return f"a weight changed from {layout} to {_layout(tensor)}"
            self._pointers = pointers
        return reason

    def _read_pointers(self) -> list[int]:
        if self._sharded:  # a distributed tensor has no storage of its own
            return [local_of(tensor).data_ptr() for tensor in self._tensors]
        return [tensor.data_ptr() for tensor in self._tensors]

    def _add_at(self, text: str, start: Any, path: Path) -> None:
        if id(start) not in self._followed:
            super()._add_at(text, start, path)

    def _add_further(self) -> None:
        """Watch the functions of the modules' classes (libraries patch modeling code), torch's global hooks, and each
        module's tables, training flag and own forward."""
        for cls in {base for module in self._modules.values() for base in type(module).__mro__}:
            for method, value in vars(cls).items() if not is_own(cls.__module__) else ():
                if isinstance(value, types.FunctionType) and not method.startswith("__") and method not in PRINTED:
                    self._add(f"the class {cls.__qualname__}", cls, method)
        for table in GLOBAL_HOOKS:
            self._add_entry("torch's hooks of every module", vars(torch.nn.modules.module), table)
        for path, module in self._modules.items():
            text, is_followed = path or "the model", id(module) in self._followed
            for table in _AROUND if is_followed else _TABLES:
                self._add_entry(text, getattr(module, table), table, "dict")
            # Wrappers replace a module's own `forward`; the root's is glowplug's.
            for attribute in () if is_followed else ("training", "forward") if path else ("training",):
                self._add_entry(text, module.__dict__, attribute)
            for tensors in () if is_followed else (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.numel() == 1:  # comparing tables would miss a replaced one
                        self._add_entry(text, tensors, name)


def _freeze(value: Any) -> Any:
    """Copy a plain container, so that changes to its content are detected; return anything else as it is."""
    if type(value) in (dict, OrderedDict):
        return {key: _freeze(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_freeze(item) for item in value)
    return set(value) if type(value) is set else value


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    local = local_of(tensor)
    return tuple(tensor.shape), tensor.dtype, tuple(local.shape), local.stride(), str(tensor.device)


def _equal(now: Any, before: Any) -> bool:
    """Compare by identity first, like containers do. A replaced tensor is never equal."""
    if now is before:
        return True
    if isinstance(now, torch.Tensor) or isinstance(before, torch.Tensor):
        return False
    try:
        return bool(now == before)
    except (RuntimeError, ValueError, TypeError):
        return False
