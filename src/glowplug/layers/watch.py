"""Notices that a model changed after it was compiled: weights replaced, hooks added, modules swapped, flags set.

A program runs without its modules' Python, so whatever that Python read is remembered here and compared at each call.
In-place changes of a weight's values need no notice: programs hold the weights themselves.
"""

from __future__ import annotations

import itertools
import operator
import sys
import types
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from glowplug.graph.sources import Access, follow, parse
from glowplug.layers.reads import CALL_HOOKS, GLOBAL_HOOKS, MARKS, NOT_WATCHED, PRINTED, TABLES, is_own, without_inert
from glowplug.layers.shards import is_sharded, local_of

_TABLES = (*TABLES, *CALL_HOOKS)
_AROUND = ("_modules", *CALL_HOOKS)
"""Those that a trace reads of a module whose own forward it does not see."""
_ROOTS = frozenset({"model", "layer"})
"""What the functions that glowplug traces call the module that they are traced for."""
_MISSING = object()


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
        self._owners: list[tuple[str, str]] = []
        self._dicts: list[Mapping[str, Any]] = []
        self._keys: list[str] = []
        self._slots: list[tuple[str, str, Any]] = []
        self._seen: set[tuple[int, Any]] = set()
        self._whole: set[tuple[int, Any]] = set()
        self._outside: dict[tuple[type, str], bool] = {}
        self._namespaces: dict[type, Mapping[str, Any]] = {}
        self._in_tree = {id(module) for module in modules.values()}
        self._collect(root, reads)
        self._add_further()
        entries = [*zip(self._dicts, self._keys, strict=True)]
        values = [table.get(key, _MISSING) for table, key in entries]
        self._is_open = [
            type(value) in _CONTAINERS and not (isinstance(value, dict) and (id(table), key) not in self._whole)
            for value, (table, key) in zip(values, entries, strict=True)
        ]
        self._values = [_freeze(v) if is_open else v for v, is_open in zip(values, self._is_open, strict=True)]
        self._slot_values = [_freeze(getattr(owner, name, _MISSING)) for _, name, owner in self._slots]
        self._lay_out()

    def change(self) -> str | None:
        """What changed since the snapshot, in words; None when nothing did, or all of it was changed back."""
        for (text, name, owner), before in zip(self._slots, self._slot_values, strict=True):
            if not _equal(getattr(owner, name, _MISSING), before):
                return f"{name} of {text} changed"
        if self._unchanged():
            return None
        values = [table.get(key, _MISSING) for table, key in zip(self._dicts, self._keys, strict=True)]
        for index, ((text, key), now, before) in enumerate(zip(self._owners, values, self._values, strict=True)):
            if not (_equal(now, before) if self._is_open[index] or type(before) is not dict else now is before):
                return f"{key} of {text} changed"
        self._lay_out()
        return None

    # -- what is watched --------------------------------------------------------------------------------------

    def _collect(self, root: nn.Module, reads: Iterable[str]) -> None:
        of_class: dict[type, list[tuple[str, nn.Module]]] = {}
        for name, module in self._modules.items():
            of_class.setdefault(type(module), []).append((name, module))
        known: set[tuple[type, tuple[Access, ...]]] = set()
        for text in dict.fromkeys(reads):
            source = parse(text)
            if source is None or not source.path or source.size is not None:
                continue
            path = source.path
            if source.is_global:
                start = sys.modules.get(source.root)
                if start is not None and not is_own(source.root):
                    self._add_at(f"the module {source.root}", start, path)
            elif source.root in _ROOTS:
                module, rest = self._last_module(root, path)
                if rest[0].name in NOT_WATCHED or rest[0].name in MARKS or rest[0].name in _TABLES:
                    continue  # tables of the model's own modules are watched whole
                if (type(module), rest) not in known:
                    known.add((type(module), rest))
                    for name, other in of_class.get(type(module), [("", module)]):
                        self._add_at(name or "the model", other, rest)

    def _last_module(self, root: nn.Module, path: Sequence[Access]) -> tuple[nn.Module, tuple[Access, ...]]:
        """The last module of the tree that a path passes, and the path from there."""
        found, start, at = root, 0, root
        for index, access in enumerate(path[:-1]):
            try:
                at = access.of(at)
            except Exception:  # whatever a property raises
                break
            if id(at) in self._in_tree:
                found, start = at, index + 1
        return found, tuple(path[start:])

    def _add_at(self, text: str, start: Any, path: Sequence[Access]) -> None:
        """Watch what lies at a path. Of a list or tuple all of it; of a dict the item that was read, and all of it only
        where its keys were."""
        kept = list(path)
        whole = kept[-1] != Access("call", "type")
        try:
            objects = follow(start, kept[:-1])
            while kept and not (kept[-1].kind == "attribute" or isinstance(objects[-1], dict)):
                kept.pop()
                objects.pop()
        except LookupError:
            return  # another module of the class may lack it
        for passed, access in zip(objects[:-1], kept, strict=False):
            if isinstance(passed, type) and access.kind == "attribute":  # such as a property
                self._add(text, passed, access.name, whole=False)
        if not kept or kept[-1].name in NOT_WATCHED:
            return
        owner, name = objects[-1], kept[-1].name
        if kept[-1].kind == "item":
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
                table = self._namespaces.setdefault(base, vars(base))
                self._add_entry(f"the class {base.__qualname__}", table, name, whole=whole)
        elif isinstance(owner, types.ModuleType):
            if not is_own(owner.__name__):
                self._add_entry(f"the module {owner.__name__}", vars(owner), name, whole=whole)
        elif self._lies_outside(type(owner), name):
            if (id(owner), name) not in self._seen:
                self._seen.add((id(owner), name))
                self._slots.append((text, name, owner))
        elif isinstance(getattr(owner, "__dict__", None), dict):
            self._add_entry(text, owner.__dict__, name, whole=whole)

    def _lies_outside(self, cls: type, name: str) -> bool:
        """Whether objects of a class keep an attribute outside of their `__dict__`."""
        if (cls, name) not in self._outside:
            kept = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
            self._outside[cls, name] = isinstance(kept, _DESCRIPTORS)
        return self._outside[cls, name]

    def _add_entry(self, text: str, table: Mapping[Any, Any], key: Any, *, whole: bool = True) -> None:
        if whole:
            self._whole.add((id(table), key))
        if (id(table), key) not in self._seen and id(table.get(key)) not in self._in_tree:
            self._seen.add((id(table), key))
            self._owners.append((text, key))
            self._dicts.append(table)
            self._keys.append(key)

    def _add_further(self) -> None:
        """Watch more than what was read."""

    # -- comparing, fast --------------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        """Lay out the values by the dict that they lie in: one C call then reads all that is watched in a dict. A key
        that was missing can only come to be if its dict grows. What can't change inside is told by identity."""
        groups: tuple[dict[int, list[int]], dict[int, list[int]]] = ({}, {})
        for index, (table, key) in enumerate(zip(self._dicts, self._keys, strict=True)):
            if key in table:
                groups[self._is_open[index]].setdefault(id(table), []).append(index)
        (self._fixed, fixed), (self._open, contents) = map(self._readers, groups)
        self._fixed_values = [self._dicts[index][self._keys[index]] for index in fixed]
        self._open_values = [self._values[index] for index in contents]
        self._unique = list({id(table): table for table in self._dicts}.values())
        self._sizes = list(map(len, self._unique))

    def _readers(self, groups: dict[int, list[int]]) -> tuple[list[tuple[Any, Mapping[str, Any]]], list[int]]:
        """For each dict what reads all of its values that are watched, as a tuple; and which they are, in order."""
        readers: list[tuple[Any, Mapping[str, Any]]] = []
        order: list[int] = []
        for indices in groups.values():
            chosen = indices if len(indices) > 1 else indices * 2  # of one key it would give no tuple
            readers.append((operator.itemgetter(*[self._keys[index] for index in chosen]), self._dicts[indices[0]]))
            order += chosen
        return readers, order

    def _unchanged(self) -> bool:
        """Whether every value is as it was, told fast; False means: look closely."""
        try:
            if list(map(len, self._unique)) != self._sizes:
                return False
            fixed = itertools.chain.from_iterable([get(table) for get, table in self._fixed])
            if not all(map(operator.is_, fixed, self._fixed_values)):
                return False
            return _equal([*itertools.chain.from_iterable([get(t) for get, t in self._open])], self._open_values)
        except KeyError:
            return False


class Watch(ReadWatch):
    """A snapshot of everything that a model's forward read in its trace, of its weights' layouts, and of its hooks.

    Args:
        model: the model, as it was compiled.
        reads: as for `ReadWatch`.
        followed: modules whose own forward runs at every call, behind an op: what they hold may change.
    """

    def __init__(self, model: nn.Module, reads: Iterable[str] = (), *, followed: Iterable[nn.Module] = ()) -> None:
        modules = dict(model.named_modules())
        self._followed = set(map(id, followed))
        super().__init__(modules, model, reads)
        self._tables = [
            (name, table, getattr(m, table))
            for name, m in modules.items()
            for table in (_TABLES if id(m) not in self._followed else _AROUND)
        ]
        self._live = [content for _, _, content in self._tables]
        self._copies = [dict(content) for content in self._live]
        own = {id(t) for m in modules.values() if id(m) in self._followed for t in m.buffers(recurse=False)}
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
        if reason is not None:
            return reason
        if not _equal(self._live, self._copies):
            for index, (owner, table, live) in enumerate(self._tables):
                before = self._copies[index]
                if table.endswith("_hooks") and without_inert(live) == without_inert(before):
                    self._copies[index] = dict(live)
                elif not _equal(live, before):
                    return f"{table.strip('_').replace('_', ' ')} of {owner or 'the model'} changed"
        pointers = self._read_pointers()
        if pointers != self._pointers:
            for tensor, layout in zip(self._tensors, self._layouts, strict=True):
                if _layout(tensor) != layout:
                    return f"a weight changed from {layout} to {_layout(tensor)}"
            self._pointers = pointers
        return None

    def _read_pointers(self) -> list[int]:
        if self._sharded:  # a distributed tensor has no memory of its own
            return [local_of(tensor).data_ptr() for tensor in self._tensors]
        return [tensor.data_ptr() for tensor in self._tensors]

    def _add_at(self, text: str, start: Any, path: Sequence[Access]) -> None:
        if id(start) not in self._followed:
            super()._add_at(text, start, path)

    def _add_further(self) -> None:
        """The functions of the modules' classes, as libraries patch modeling code; torch's hooks of every module; and
        of each module whether it trains, and a forward of its own."""
        for cls in {base for module in self._modules.values() for base in type(module).__mro__}:
            if not is_own(cls.__module__):
                for method, value in vars(cls).items():
                    if isinstance(value, types.FunctionType) and not method.startswith("__") and method not in PRINTED:
                        self._add(f"the class {cls.__qualname__}", cls, method)
        for table in GLOBAL_HOOKS:  # torch.nn.modules.module.register_module_forward_hook; as in torch 2.11 and 2.13
            self._add_entry("torch's hooks of every module", vars(torch.nn.modules.module), table)
        for path, module in self._modules.items():
            if id(module) in self._followed:
                continue
            # A module's own `forward` is what wrappers replace; the root's is glowplug's.
            for attribute in ("training", "forward") if path else ("training",):
                self._add_entry(path or "the model", module.__dict__, attribute)


_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)
"""By which an object gives what lies outside of its `__dict__`: slots, a closure's cells, defaults."""
_CONTAINERS = frozenset({dict, OrderedDict, list, tuple, set})


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
