"""Values of annotated types as JSON: what is read is what the annotations say, or refused; none of it is run.

A dataclass is a dictionary of its fields. Where an annotation leaves the type open, a tag tells it.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import sympy
import torch
from torch import fx

from glowplug.errors import ArtifactError, NotStorableError
from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.split import Value
from glowplug.ops.layer_op import LayerOp, find_op_by_name, known_layer_ops
from glowplug.store.sizes import read_size, write_size

Convert = Callable[[Any], Any]


@functools.cache
def codec(annotation: Any) -> tuple[Convert, Convert]:
    """Two functions: one writes a value of a type, the other reads it.

    The first raises NotStorableError for a value without a form; the second raises ArtifactError, or whatever comes of
    content that the first has not written.
    """
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _SPECIAL:
        return _SPECIAL[annotation]
    if annotation in (str, int, bool):
        return _as_it_is, functools.partial(_only, annotation)
    if origin in (tuple, list, frozenset):
        write, read = codec(inner[0])
        return (lambda value: [write(item) for item in value]), (lambda body: origin(map(read, _only(list, body))))
    if origin is Mapping:
        write, read = codec(inner[1])
        return (
            lambda value: {key: write(item) for key, item in value.items()},
            lambda body: {key: read(item) for key, item in _only(dict, body).items()},
        )
    if origin in (types.UnionType, typing.Union):
        members = [member for member in inner if member is not types.NoneType]
        return _optional(*codec(members[0])) if len(members) == 1 else _one_of(members)
    if is_dataclass(annotation):
        hints = typing.get_type_hints(annotation)
        return _dataclass(annotation, {field.name: codec(hints[field.name]) for field in fields(annotation)})
    raise TypeError(f"values of {annotation} have no form")


def _as_it_is(value: Any) -> Any:
    return value


def _only(cls: type, body: Any) -> Any:
    if type(body) is not cls:
        raise ArtifactError(f"it has a {type(body).__name__} in the place of a {cls.__name__}")
    return body


def _dataclass(cls: Any, held: Mapping[str, tuple[Convert, Convert]]) -> tuple[Convert, Convert]:
    return (
        lambda value: {name: write(getattr(value, name)) for name, (write, _) in held.items()},
        lambda body: cls(**{name: read(body[name]) for name, (_, read) in held.items()}),
    )


def _optional(write: Convert, read: Convert) -> tuple[Convert, Convert]:
    return (
        lambda value: None if value is None else write(value),
        lambda body: None if body is None else read(body),
    )


def _one_of(classes: list[Any]) -> tuple[Convert, Convert]:
    held = {cls.__name__: codec(cls) for cls in classes}

    def write(value: Any) -> Any:
        name = type(value).__name__
        return {name: held[name][0](value)}

    def read(body: Any) -> Any:
        ((name, content),) = _only(dict, body).items()
        return held[name][1](content)

    return write, read


def _write_any(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    for name, (cls, write, _) in _TAGS.items():
        if isinstance(value, cls):
            return {name: write(value)}
    raise NotStorableError(f"an op has an argument of type {type(value).__name__}")


def _read_any(body: Any) -> Any:
    if not isinstance(body, dict):
        return body
    ((name, content),) = body.items()
    return _TAGS[name][2](content)


def _write_print(found: Fingerprint) -> str:
    if not found.stable:
        raise NotStorableError("a piece calls a function that was made inside another, which no other process can find")
    return found.digest


def _read_op(name: str) -> LayerOp:
    op = find_op_by_name(name)
    if op is None:
        raise ArtifactError(f"it calls the op {name}, which this process has not registered")
    return op


def _read_overload(name: str) -> Any:
    return {str(overload): overload for op in known_layer_ops() for overload in op.overloads.values()}[name]


def _read_dtype(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ArtifactError(f"torch has no dtype {name[:40]!a}")
    return found


_SPECIAL: dict[Any, tuple[Convert, Convert]] = {
    Any: (_write_any, _read_any),
    Fingerprint: (_write_print, lambda body: Fingerprint(_only(str, body))),
    LayerOp: (lambda op: op.name, _read_op),
}
_TAGS: dict[str, tuple[type, Convert, Convert]] = {
    "value": (Value, lambda value: value.name, lambda body: Value(_only(str, body))),
    "tuple": (tuple, *codec(tuple[Any, ...])),
    "list": (list, *codec(list[Any])),
    "dict": (dict, *codec(Mapping[str, Any])),
    "dtype": (torch.dtype, str, _read_dtype),
    "device": (torch.device, str, torch.device),
    "size": (sympy.Basic, write_size, read_size),
    "overload": (torch._ops.OpOverload, str, _read_overload),
    "graph": (fx.GraphModule, lambda _: None, lambda _: None),  # graphs are stored with their pieces
}
