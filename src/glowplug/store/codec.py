"""Encodes values as JSON by their type annotations. Reading checks every type and never runs code.

A dataclass becomes a dictionary of its fields. Where the annotation is `Any`, a tag names the type.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

import sympy
import torch
from torch import fx

from glowplug.errors import ArtifactError, NotStorableError
from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.split import Value
from glowplug.ops.layer_op import LayerOp, find_op_by_name, known_layer_ops
from glowplug.store.sizes import read_size, write_size

Codec = tuple[Callable[[Any], Any], Callable[[Any], Any]]
"""(write, read). `write` raises NotStorableError; `read` raises ArtifactError, or anything on malformed content."""


@functools.cache
def codec(hint: Any) -> Codec:
    """The functions that write and read values of a type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SPECIAL:
        return _SPECIAL[hint]
    if origin in (tuple, list, frozenset):
        write, read = codec(inner[0])
        return (lambda value: [write(item) for item in value]), (
            lambda body: origin([read(item) for item in _only(list, body)])
        )
    if origin is Mapping:
        write, read = codec(inner[1])
        return (
            lambda value: {key: write(item) for key, item in value.items()},
            lambda body: {key: read(item) for key, item in _only(dict, body).items()},
        )
    if origin in (types.UnionType, typing.Union):
        members = {cls.__name__: codec(cls) for cls in inner if cls is not types.NoneType}
        return _union(members) if len(members) > 1 else _optional(*codec(inner[0]))
    if is_dataclass(hint):
        return _dataclass(hint, {name: codec(inner) for name, inner in typing.get_type_hints(hint).items()})
    return functools.partial(_only, hint, error=NotStorableError), functools.partial(_only, hint)


def _only(cls: type, value: Any, error: type[Exception] = ArtifactError) -> Any:
    if type(value) is not cls:
        raise error(f"it has a {type(value).__name__} where a {cls.__name__} is expected")
    return value


def _union(members: Mapping[str, Codec]) -> Codec:
    def write(value: Any) -> Any:
        name = type(value).__name__
        return {name: members[name][0](value)}

    def read(body: Any) -> Any:
        ((name, content),) = _only(dict, body).items()
        return members[name][1](content)

    return write, read


def _optional(write: Callable[[Any], Any], read: Callable[[Any], Any]) -> Codec:
    return (lambda value: None if value is None else write(value)), (lambda body: None if body is None else read(body))


def _dataclass(cls: Any, fields: Mapping[str, Codec]) -> Codec:
    return (
        lambda value: {name: write(getattr(value, name)) for name, (write, _) in fields.items()},
        lambda body: cls(**{name: read(body[name]) for name, (_, read) in fields.items()}),
    )


def _write_any(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    for tag, (cls, (write, _)) in _TAGS.items():
        if isinstance(value, cls):
            return {tag: write(value)}
    raise NotStorableError(f"an op has an argument of type {type(value).__name__}")


def _read_any(body: Any) -> Any:
    if not isinstance(body, (dict, list)):
        return body
    ((tag, content),) = _only(dict, body).items()
    return _TAGS[tag][1][1](content)


def _write_fingerprint(piece: Fingerprint) -> str:
    if not piece.stable:
        raise NotStorableError("a piece calls a function defined inside another, which no other process can find")
    return piece.digest


def _read_op(name: str) -> LayerOp:
    op = find_op_by_name(name)
    if op is None:
        raise ArtifactError(f"it calls the op {name}, which this process has not registered")
    return op


_SPECIAL: dict[Any, Codec] = {
    Any: (_write_any, _read_any),
    Fingerprint: (_write_fingerprint, lambda body: Fingerprint(_only(str, body))),
    LayerOp: (lambda op: op.name, _read_op),
}
_TAGS: dict[str, tuple[type, Codec]] = {
    "value": (Value, codec(Value)),
    "tuple": (tuple, codec(tuple[Any, ...])),
    "list": (list, codec(list[Any])),
    "dict": (dict, codec(Mapping[str, Any])),
    "dtype": (torch.dtype, (str, lambda body: _only(torch.dtype, getattr(torch, body.removeprefix("torch."))))),
    "device": (torch.device, (str, torch.device)),
    "size": (sympy.Basic, (write_size, read_size)),
    "overload": (
        torch._ops.OpOverload,
        (str, lambda body: {str(item): item for op in known_layer_ops() for item in op.overloads.values()}[body]),
    ),
    "graph": (fx.GraphModule, (lambda _: None, lambda _: None)),  # graphs are stored with their pieces
}
