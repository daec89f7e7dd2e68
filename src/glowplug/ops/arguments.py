"""Keyword arguments as an op can carry them: a list of tensors, and a text that says what each name is."""

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
"""Stands in the text for the cache of the `ForwardContext`."""

NOTHING: Any = object()
"""What a layer hands on that was to hand on a tensor, and has none."""


def encode(kwargs: Mapping[str, Any], caches: type | tuple[type, ...] = ()) -> tuple[list[Tensor], str]:
    """The tensors among keyword arguments, and a text for `decode`. Runs inside traces.

    Args:
        kwargs: tensors, None, booleans, numbers, and tuples and dicts of these; and caches; by name.
        caches: classes whose values stand for the `ForwardContext`'s cache.

    Returns:
        The tensors, and `name=literal`, `name=@0` (a tensor), `name=@0,1` (a tuple of them) or `name=#` (the
        context's cache), joined by `;`. What holds tensors deeper is a literal with `@0` in it. A tensor may be None
        when it is called, as masks are.

    Raises:
        CaptureError: a value is none of these.
    """
    tensors: list[Tensor] = []
    options: list[str] = []
    for name in sorted(kwargs):  # what `decode` gives back has the same text
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
    """What holds tensors as a literal, its tensors put at the end of the list."""
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
    """The keyword arguments that `encode` wrote down.

    Raises:
        NotServableError: one is `NOTHING`.
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
    """A tuple or dict with bytes in the place of each tensor: its number."""

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
    """What `encode` wrote down: the constant keyword arguments; and of the others where their tensors are, None for the
    cache."""
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
