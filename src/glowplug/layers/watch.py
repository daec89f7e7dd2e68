"""Notices that a model changed after it was compiled: weights replaced, hooks added, modules swapped, flags set.

A program runs without its modules' Python, so whatever that Python read is remembered here and compared at each call.
In-place changes of a weight's values need no notice: programs hold the weights themselves.
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
"""Those that a trace reads of a module whose own forward it does not see."""
_ROOTS = frozenset({"model", "layer"})
"""What the functions that glowplug traces call the module that they are traced for."""
_OUTSIDE = (types.MemberDescriptorType, types.GetSetDescriptorType)
"""By which an object gives what lies outside of its `__dict__`: slots, a closure's cells, defaults."""
_CONTAINERS = frozenset({dict, OrderedDict, list, tuple, set})
_MISSING = object()
_Read = Literal["item", "attribute", "dict"]


@dataclass(slots=True)
class _Entry:
    """Something watched."""

    text: str  # whose it is, for a person
    owner: Any  # a dict that has it as an item, or is it; or an object that has it as an attribute
    key: Any
    read: _Read
    whole: bool  # of a dict there, whether what it holds is watched, too
    before: Any = None  # a copy, if it is a container whose content is watched; else itself
    is_open: bool = False  # whether it is such a container

    def now(self) -> Any:
        if self.read == "dict":
            return self.owner
        return self.owner.get(self.key, _MISSING) if self.read == "item" else getattr(self.owner, self.key, _MISSING)

    def take(self) -> None:
        """Remember what it is now."""
        now = self.now()
        self.is_open = type(now) in _CONTAINERS and (self.whole or not isinstance(now, dict))
        self.before = _freeze(now) if self.is_open else now

    def changed(self) -> bool:
        """Whether it is another one, or holds something else."""
        now, before = self.now(), self.before
        if self.key in CALL_HOOKS and self.read == "dict":
            return without_inert(now) != without_inert(before)
        if self.is_open or now is before:
            return not _equal(now, before)
        return type(before) is dict or type(now) is not type(before) or not _equal(now, before)  # 2 is not 2.0

    def __str__(self) -> str:
        key = self.key.strip("_").replace("_", " ") if self.read == "dict" else self.key
        return f"{key} of {self.text} changed"


class ReadWatch:
    """A snapshot of what a trace read of some modules, and of objects, classes and globals around them.

    Args:
        modules: the modules, by name.
        root: the one that was traced.
        reads: sources of what the trace read, such as `L['model']._modules['lm_head'].training`. What was read from one
            module is watched on every module of its class.
    """

    def __init__(self, modules: Mapping[str, nn.Module], root: nn.Module, reads: Iterable[str]) -> None:
        self._modules = modules
        self._entries: dict[tuple[int, Any], _Entry] = {}
        self._outside: dict[tuple[type, str], bool] = {}
        self._namespaces: dict[type, Mapping[str, Any]] = {}
        self._in_tree = {id(module) for module in modules.values()}
        self._collect(root, reads)
        self._add_further()
        self._take()

    def change(self) -> str | None:
        """What changed since the snapshot, in words; None when nothing did, or all of it was changed back."""
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
        known: set[tuple[type, Path]] = set()
        for source in map(parse, dict.fromkeys(reads)):
            if source is None or not source.path or source.size is not None:
                continue
            if source.is_global:
                start = sys.modules.get(source.root)
                if start is not None and not is_own(source.root):
                    self._add_at(f"the module {source.root}", start, source.path)
            elif source.root in _ROOTS:
                module, rest = self._last_module(root, source.path)
                unread = rest[0].name in NOT_WATCHED or rest[0].name in MARKS
                if unread or rest[0].name in _TABLES or (type(module), rest) in known:
                    continue  # tables of the model's own modules are watched whole
                known.add((type(module), rest))
                for name, other in of_class.get(type(module), [("", module)]):
                    self._add_at(name or "the model", other, rest)

    def _last_module(self, root: nn.Module, path: Path) -> tuple[nn.Module, Path]:
        """The last module of the tree that a path passes, and the path from there."""
        found, start, at = root, 0, root
        for index, access in enumerate(path[:-1], 1):
            try:
                at = access.of(at)
            except Exception:  # whatever a property raises
                break
            if id(at) in self._in_tree:
                found, start = at, index
        return found, path[start:]

    def _add_at(self, text: str, start: Any, path: Path) -> None:
        """Watch what lies at a path. Of a list or tuple all of it; of a dict the item that was read, and all of it only
        where its keys were."""
        kept = list(path)
        whole = kept[-1] != Access("call", "type")
        try:
            objects = follow(start, kept[:-1])
        except LookupError:
            return  # another module of the class may lack it
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
        """Watch one attribute of an object; of a dict there, with `whole`, what it holds."""
        if isinstance(owner, type):
            base = next((base for base in owner.__mro__ if name in vars(base)), None)
            if base is not None and not is_own(base.__module__):
                table = self._namespaces.setdefault(base, vars(base))  # another one each time
                self._add_entry(f"the class {base.__qualname__}", table, name, whole=whole)
        elif isinstance(owner, types.ModuleType):
            if not is_own(owner.__name__):
                self._add_entry(f"the module {owner.__name__}", vars(owner), name, whole=whole)
        elif self._lies_outside(type(owner), name):
            self._add_entry(text, owner, name, "attribute")
        elif isinstance(getattr(owner, "__dict__", None), dict):
            self._add_entry(text, owner.__dict__, name, whole=whole)

    def _lies_outside(self, cls: type, name: str) -> bool:
        """Whether objects of a class keep an attribute outside of their `__dict__`."""
        if (cls, name) not in self._outside:
            kept = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
            self._outside[cls, name] = isinstance(kept, _OUTSIDE)
        return self._outside[cls, name]

    def _add_entry(self, text: str, owner: Any, key: Any, read: _Read = "item", *, whole: bool = True) -> None:
        entry = self._entries.get((id(owner), key))
        if entry is not None:
            entry.whole |= whole
        elif read != "item" or id(owner.get(key)) not in self._in_tree:
            self._entries[id(owner), key] = _Entry(text, owner, key, read, whole)

    def _add_further(self) -> None:
        """Watch more than what was read."""

    # -- comparing, fast --------------------------------------------------------------------------------------

    def _take(self) -> None:
        """Lay out the values by the dict that they lie in: one C call then reads all that is watched in a dict. A key
        that was missing can only come to be if its dict grows. What can't change inside is told by identity."""
        groups: dict[tuple[bool, int], list[_Entry]] = {}
        for entry in self._entries.values():
            entry.take()
            if entry.read == "item" and entry.key in entry.owner:
                groups.setdefault((entry.is_open, id(entry.owner)), []).append(entry)
        readers: tuple[list[_Reader], list[_Reader]] = ([], [])
        values: tuple[list[Any], list[Any]] = ([], [])
        for (is_open, _), group in groups.items():
            chosen = group if len(group) > 1 else group * 2  # of one key it would give no tuple
            readers[is_open].append((operator.itemgetter(*[entry.key for entry in chosen]), chosen[0].owner))
            values[is_open].extend(entry.before for entry in chosen)
        (self._fixed, self._open), (self._fixed_values, self._open_values) = readers, values
        self._dicts = list({id(e.owner): e.owner for e in self._entries.values() if e.read == "item"}.values())
        self._sizes = list(map(len, self._dicts))
        self._live = [entry.owner for entry in self._entries.values() if entry.read == "dict"]
        self._copies = [entry.before for entry in self._entries.values() if entry.read == "dict"]
        self._attributes = [entry for entry in self._entries.values() if entry.read == "attribute"]

    def _unchanged(self) -> bool:
        """Whether every value is as it was, told fast; False means: look closely."""
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
    """A snapshot of everything that a model's forward read in its trace, of its weights' layouts, and of its hooks.

    Args:
        model: the model, as it was compiled.
        reads: as for `ReadWatch`.
        followed: modules whose own forward runs at every call, behind an op: what they hold may change.
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
        """What changed since the snapshot, in words; None when nothing did, or all of it was changed back. Costs well
        under a microsecond a module.

        A weight whose storage alone was replaced (same shape, dtype, strides and device) is followed: programs hold
        the parameter object.
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
        if self._sharded:  # a distributed tensor has no memory of its own
            return [local_of(tensor).data_ptr() for tensor in self._tensors]
        return [tensor.data_ptr() for tensor in self._tensors]

    def _add_at(self, text: str, start: Any, path: Path) -> None:
        if id(start) not in self._followed:
            super()._add_at(text, start, path)

    def _add_further(self) -> None:
        """The functions of the modules' classes, as libraries patch modeling code; torch's hooks of every module; and
        of each module its tables, whether it trains, and a forward of its own."""
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
            # A module's own `forward` is what wrappers replace; the root's is glowplug's.
            for attribute in () if is_followed else ("training", "forward") if path else ("training",):
                self._add_entry(text, module.__dict__, attribute)
            for tensors in () if is_followed else (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.numel() == 1:  # two may be equal and not the same
                        self._add_entry(text, tensors, name)


def _freeze(value: Any) -> Any:
    """A copy of a plain container, so that a change inside it is seen; anything else as it is."""
    if type(value) in (dict, OrderedDict):
        return {key: _freeze(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_freeze(item) for item in value)
    return set(value) if type(value) is set else value


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    local = local_of(tensor)
    return tuple(tensor.shape), tensor.dtype, tuple(local.shape), local.stride(), str(tensor.device)


def _equal(now: Any, before: Any) -> bool:
    """Equality that asks for identity first, as comparing containers does; a replaced tensor is a change."""
    if now is before:
        return True
    if isinstance(now, torch.Tensor) or isinstance(before, torch.Tensor):
        return False
    try:
        return bool(now == before)
    except (RuntimeError, ValueError, TypeError):
        return False
