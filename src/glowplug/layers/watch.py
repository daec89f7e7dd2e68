"""Notices that a model changed after it was compiled: weights replaced, hooks added, modules swapped, flags set.

A program runs without its modules' Python, so whatever that Python could have read is remembered here and compared.
In-place changes of a weight's values need no notice: programs hold the weights themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from glowplug.layers.registry import MARKS

_TABLES = (
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_hooks",
    "_forward_pre_hooks",
)
_IGNORED = MARKS | {"forward", "_glowplug_experts_fn", "_glowplug_attention_fn", "_glowplug_engine"}


@dataclass(frozen=True)
class _Module:
    name: str
    module: nn.Module
    attributes: dict[str, Any]
    tables: tuple[tuple[str, dict[str, Any]], ...]


class Watch:
    """A snapshot of everything that a model's forward can read.

    Args:
        model: the model, as it was compiled.
        ignore: names of attributes of the root that forwards may write to.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            _Module(name, m, _attributes(m), tuple((t, dict(getattr(m, t))) for t in _TABLES))
            for name, m in model.named_modules()
        ]
        self._tensors = [*model.parameters(), *model.buffers()]
        self._layouts = [_layout(t) for t in self._tensors]
        self._pointers = [t.data_ptr() for t in self._tensors]
        self._hooks = [table for m in model.modules() for table in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooked = [bool(table) for table in self._hooks]
        self._tables = [table for m in model.modules() for table in (m._parameters, m._buffers, m._modules)]
        self._table_copies = [dict(table) for table in self._tables]

    def quick_change(self) -> bool:
        """Whether anything changed that a decode loop's caller could plausibly have changed: weights moved or
        replaced, submodules swapped, hooks added. Costs microseconds a layer; `change` is the whole comparison."""
        return (
            [t.data_ptr() for t in self._tensors] != self._pointers
            or not _same_tables(self._tables, self._table_copies)
            or [bool(table) for table in self._hooks] != self._hooked
        )

    def change(self) -> str | None:
        """What changed since the snapshot, in words; None when nothing did. Weights whose storage alone was replaced
        (same shape, dtype, strides, device) are followed, not reported: programs hold the parameter objects."""
        for entry in self._modules:
            where = entry.name or "the model"
            for table, before in entry.tables:
                now = getattr(entry.module, table)
                if not _same(now, before):
                    return f"{table.lstrip('_').replace('_', ' ')} of {where} changed"
            attributes = _attributes(entry.module)
            if not _same(attributes, entry.attributes):
                changed = [
                    name
                    for name in attributes.keys() | entry.attributes.keys()
                    if not _equal(attributes.get(name, _MISSING), entry.attributes.get(name, _MISSING))
                ]
                if changed:
                    return f"{', '.join(sorted(changed))} of {where} changed"
        for tensor, layout in zip(self._tensors, self._layouts, strict=True):
            if _layout(tensor) != layout:
                return f"a weight changed its shape, dtype, strides or device, from {layout} to {_layout(tensor)}"
        self._pointers = [t.data_ptr() for t in self._tensors]
        return None


_MISSING = object()


def _attributes(module: nn.Module) -> dict[str, Any]:
    found = {k: v for k, v in module.__dict__.items() if k not in _IGNORED and k not in _TABLES}
    return {k: (_freeze(v) if isinstance(v, (list, dict, set)) else v) for k, v in found.items()}


def _freeze(value: Any) -> Any:
    """A copy of a small container, so that a change inside it is seen."""
    if isinstance(value, dict):
        return {k: _freeze(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_freeze(v) for v in value]
    return set(value) if isinstance(value, set) else value


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.stride(), tensor.device, tensor.requires_grad


def _same_tables(now: list[Any], before: list[Any]) -> bool:
    try:
        return now == before  # compares by identity first, so tensors are compared only when they were replaced
    except RuntimeError:  # a replaced tensor has no truth value
        return False


def _same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    try:
        return now == before
    except RuntimeError:
        return False


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return False
    try:
        return bool(a == b)
    except (RuntimeError, ValueError, TypeError):
        return False
