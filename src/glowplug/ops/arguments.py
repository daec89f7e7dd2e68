"""Encodes keyword arguments for an op: as a list of tensors, and a text that describes each argument."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from glowplug.errors import CaptureError, NotServableError

CONTEXT_CACHE = "#"
"""Marks the cache of the `ForwardContext` in the text."""

NOTHING: Any = object()
"""Passed on by a layer that was expected to pass on a tensor but has none."""


def encode(kwargs: Mapping[str, Any], caches: type | tuple[type, ...] = ()) -> tuple[list[Tensor], str]:
    """The tensors among keyword arguments, and a text for `decode`. Runs inside traces.

    Args:
        kwargs: by name: tensors, None, booleans, numbers, tuples and dicts of these, and caches.
        caches: cache classes; an instance stands for the `ForwardContext`'s cache.

    Returns:
        The tensors, and `name=literal`, `name=@0` (a tensor), `name=@0,1` (a tuple of tensors) or `name=#` (the
        context's cache), joined by `;`. Deeper tuples and dicts are literals with `@0` for each tensor. A tensor may
        be None at run time, as masks may be.

    Raises:
        CaptureError: a value has another type.
    """
    tensors: list[Tensor] = []
    options: list[str] = []
    for name in sorted(kwargs):  # so that encoding the result of `decode` gives the same text
        value = kwargs[name]
        if isinstance(value, Tensor):
            options.append(f"{name}=@{len(tensors)}")
            tensors.append(value)
        elif value is None or isinstance(value, (bool, int, float)):
            options.append(f"{name}={value!r}")
        elif isinstance(value, caches):
            options.append(f"{name}={CONTEXT_CACHE}")
        elif isinstance(value, tuple) and value and all(isinstance(item, Tensor) for item in value):
            places = ",".join(str(len(tensors) + number) for number in range(len(value)))
            options.append(f"{name}=@{places}," if len(value) == 1 else f"{name}=@{places}")
            tensors.extend(value)
        else:
            options.append(f"{name}={_literal(name, value, tensors)}")
    return tensors, ";".join(options)


def _literal(name: str, value: Any, tensors: list[Tensor]) -> str:
    """The literal of a value; its tensors are appended to the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return f"@{len(tensors) - 1}"
    if isinstance(value, tuple):
        return "(" + "".join(f"{_literal(name, item, tensors)}," for item in value) + ")"
    if isinstance(value, dict) and all(isinstance(key, str) and key.isidentifier() for key in value):
        return "{" + "".join(f"'{key}': {_literal(name, item, tensors)}," for key, item in value.items()) + "}"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    raise CaptureError(f"a layer got {name} of a type that glowplug can't pass on")


def decode(options: str, tensors: list[Tensor], cache: Any = None) -> dict[str, Any]:
    """The keyword arguments that `encode` encoded.

    Raises:
        NotServableError: one of them is `NOTHING`.
    """
    constants, named = parse(options)
    kwargs = dict(constants)
    for name, places in named:
        if places is None:
            kwargs[name] = cache
        elif isinstance(places, int):
            kwargs[name] = tensors[places]
            if tensors[places] is NOTHING:
                raise NotServableError(f"a layer got no {name}, which its trace had")
        elif isinstance(places, _Nested):
            kwargs[name] = _fill(places.literal, tensors)
        else:
            kwargs[name] = tuple(tensors[place] for place in places)
    return kwargs


@dataclass(frozen=True)
class _Nested:
    """A tuple or dict with the index of each tensor, as bytes, in the place of the tensor."""

    literal: Any


def _fill(literal: Any, tensors: list[Tensor]) -> Any:
    if isinstance(literal, bytes):
        return tensors[int(literal)]
    if isinstance(literal, tuple):
        return tuple(_fill(item, tensors) for item in literal)
    return {key: _fill(item, tensors) for key, item in literal.items()} if isinstance(literal, dict) else literal


Places = int | tuple[int, ...] | _Nested | None


@lru_cache(maxsize=4096)
def parse(options: str) -> tuple[tuple[tuple[str, Any], ...], tuple[tuple[str, Places], ...]]:
    """Parse the text of `encode`: the constant keyword arguments; and for each of the others the places of its tensors,
    or None for the cache."""
    constants: list[tuple[str, Any]] = []
    named: list[tuple[str, Places]] = []
    for option in options.split(";") if options else ():
        name, _, text = option.partition("=")
        if text == CONTEXT_CACHE:
            named.append((name, None))
        elif text[:1] in ("(", "{"):
            named.append((name, _Nested(ast.literal_eval(re.sub(r"@(\d+)", r"b'\1'", text)))))
        elif not text.startswith("@"):
            constants.append((name, ast.literal_eval(text)))
        elif "," in text:
            named.append((name, tuple(int(place) for place in text[1:].split(",") if place)))
        else:
            named.append((name, int(text[1:])))
    return tuple(constants), tuple(named)
