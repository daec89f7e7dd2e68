"""Notices that a model changed after it was compiled: weights replaced, hooks added, modules swapped, flags set.

A program runs without its modules' Python, so whatever that Python read is remembered here and compared at each call.
In-place changes of a weight's values need no notice: programs hold the weights themselves.
"""

from __future__ import annotations

import operator
import re
import sys
import types
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from glowplug.layers.registry import MARKS
from glowplug.layers.shards import is_sharded, local_of

_TABLES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_AROUND = ("_modules", "_forward_hooks", "_forward_pre_hooks")
"""Those that a trace reads of a module whose own forward it does not see."""
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
_READ = re.compile(r"(L\['model'\].*)\.(\w+)$")
_READ_GLOBAL = re.compile(r"G\['__import_(\w+)'\]\.(\w+)$")
_INERT_HOOKS = "transformers.utils.output_capturing"
_OWN = ("torch", "glowplug", "builtins")
_NOT_READ = {
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "__class__",
    "_experts_implementation_internal",  # the engine compares it: some values mean the same
}


class Watch:
    """A snapshot of everything that a model's forward read in its trace.

    Args:
        model: the model, as it was compiled.
        reads: sources of what the trace read, such as `L['model']._modules['lm_head'].training`. An attribute read
            from one module is watched on every module of its class.
        followed: modules whose own forward runs at every call, behind an op: what they hold may change.
    """

    def __init__(self, model: nn.Module, reads: Iterable[str] = (), *, followed: Iterable[nn.Module] = ()) -> None:
        modules = dict(model.named_modules())
        self._followed = set(map(id, followed))
        self._owners: list[tuple[str, str]] = []
        self._dicts: list[Mapping[str, Any]] = []
        self._keys: list[str] = []
        self._collect(model, modules, reads)
        self._values = [_freeze(table.get(key, _MISSING)) for table, key in zip(self._dicts, self._keys, strict=True)]
        self._remember()
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

    def _read_pointers(self) -> list[int]:
        if self._sharded:  # a distributed tensor has no memory of its own
            return [local_of(tensor).data_ptr() for tensor in self._tensors]
        return [tensor.data_ptr() for tensor in self._tensors]

    def _collect(self, model: nn.Module, modules: dict[str, nn.Module], reads: Iterable[str]) -> None:
        by_class: dict[type, set[str]] = {}
        seen: set[tuple[int, str]] = set()
        held: set[tuple[type, tuple[str, ...], str]] = set()
        for source in dict.fromkeys(reads):
            name = _READ_GLOBAL.match(source)
            if name is not None:
                file = sys.modules.get(name[1].replace("_dot_", "."))
                if file is not None and not file.__name__.startswith(_OWN):
                    self._add(f"the module {file.__name__}", file.__dict__, name[2], seen)
                continue
            read = _READ.match(source)
            if read is None or read[2] in MARKS or read[2] in _TABLES or read[2] in _NOT_READ:
                continue
            try:
                owner = eval(read[1], {"__builtins__": {}}, {"L": {"model": model}})
            except Exception:
                continue  # an expression over more than plain attributes; Dynamo guards it, nobody can rebind it
            if isinstance(owner, nn.Module):
                by_class.setdefault(type(owner), set()).add(read[2])
            elif isinstance(getattr(owner, "__dict__", None), dict) and not isinstance(owner, type):
                self._add(f"the model's {type(owner).__name__}", owner.__dict__, read[2], seen)
                held.add((*_holder(read[1], model), read[2]))
        self._add_classes({type(module) for module in modules.values()}, seen)
        for table in _GLOBAL_HOOKS:  # torch.nn.modules.module.register_module_forward_hook; as in torch 2.11 and 2.13
            self._add("torch's hooks of every module", vars(torch.nn.modules.module), table, seen)
        for cls, attributes, key in held:  # each layer may have such an object of its own
            for module in modules.values():
                if type(module) is cls and (other := _follow(module, attributes)) is not None:
                    self._add(f"the model's {type(other).__name__}", other.__dict__, key, seen)
        for path, module in modules.items():
            if id(module) in self._followed:
                continue
            # A module's own `forward` is what wrappers replace; the root's is glowplug's.
            always = {"training", "forward"} if path else {"training"}
            for attribute in sorted(by_class.get(type(module), set()) | always):
                self._add(path or "the model", module.__dict__, attribute, seen)

    def _add_classes(self, classes: Iterable[type], seen: set[tuple[int, str]]) -> None:
        """The functions of the modules' classes: libraries patch modeling code."""
        for cls in {base for leaf in classes for base in leaf.__mro__}:
            if not cls.__module__.startswith(_OWN):
                for method, value in vars(cls).items():
                    if isinstance(value, types.FunctionType) and not method.startswith("__"):
                        self._add(f"the class {cls.__qualname__}", vars(cls), method, seen)

    def _add(self, owner: str, table: Mapping[str, Any], key: str, seen: set[tuple[int, str]]) -> None:
        if (id(table), key) not in seen and not isinstance(table.get(key), nn.Module):
            seen.add((id(table), key))
            self._owners.append((owner, key))
            self._dicts.append(table)
            self._keys.append(key)

    def _remember(self) -> None:
        """Lay out the values by the dict that they lie in: one C call then reads all that is watched in a dict. A key
        that was missing can only come to be if its dict grows."""
        present: dict[int, list[int]] = {}
        for index, (table, key) in enumerate(zip(self._dicts, self._keys, strict=True)):
            if key in table:
                present.setdefault(id(table), []).append(index)
        self._readers = [
            (operator.itemgetter(*[self._keys[index] for index in indices]), self._dicts[indices[0]])
            for indices in present.values()
        ]
        self._read = [
            tuple(self._values[index] for index in indices) if len(indices) > 1 else self._values[indices[0]]
            for indices in present.values()
        ]
        self._unique = list({id(table): table for table in self._dicts}.values())
        self._sizes = list(map(len, self._unique))

    def _same_values(self) -> bool:
        """Whether every value is as it was, told fast; False means: look closely."""
        try:
            return list(map(len, self._unique)) == self._sizes and _equal(
                [read(table) for read, table in self._readers], self._read
            )
        except KeyError:
            return False

    def change(self) -> str | None:
        """What changed since the snapshot, in words; None when nothing did. Costs well under a microsecond a module.

        A weight whose storage alone was replaced (same shape, dtype, strides and device) is followed: programs hold
        the parameter object.
        """
        if not self._same_values():
            values = [table.get(key, _MISSING) for table, key in zip(self._dicts, self._keys, strict=True)]
            for (owner, key), now, before in zip(self._owners, values, self._values, strict=True):
                if not _equal(now, before):
                    return f"{key} of {owner} changed"
            self._sizes = list(map(len, self._unique))
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


def _holder(source: str, model: nn.Module) -> tuple[type, tuple[str, ...]]:
    """The class of the module that the source of an object passes last, and the attributes from there to the object."""
    attributes: list[str] = []
    while (last := re.match(r"(.*)\.(\w+)$", source)) is not None:
        source = last[1]
        attributes.insert(0, last[2])
        owner = eval(source, {"__builtins__": {}}, {"L": {"model": model}})
        if isinstance(owner, nn.Module):
            return type(owner), tuple(attributes)
    return type(None), ()


def _follow(module: nn.Module, attributes: Sequence[str]) -> Any:
    """The object that lies at attributes of a module; None when there is none with attributes of its own."""
    found: Any = module
    for name in attributes:
        found = getattr(found, name, None)
    return found if isinstance(getattr(found, "__dict__", None), dict) and not isinstance(found, type) else None


_MISSING = object()


def without_inert(hooks: dict[Any, Any]) -> dict[Any, Any]:
    """Hooks without those that transformers leaves behind once hidden states or attentions were asked for: they do
    nothing unless a call asks again, and such a call runs eager."""
    return {k: hook for k, hook in hooks.items() if getattr(hook, "__module__", None) != _INERT_HOOKS}


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
    try:
        return bool(now == before)
    except (RuntimeError, ValueError, TypeError):
        return False
