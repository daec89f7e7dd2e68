"""Keyword arguments as an op can carry them: a list of tensors, and a text that says what each name is."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor

from glowplug.errors import CaptureError

CONTEXT_CACHE = "#"
"""Stands in the text for the cache of the `ForwardContext`."""


def encode(kwargs: Mapping[str, Any], caches: type | tuple[type, ...] = ()) -> tuple[list[Tensor], str]:
    """The tensors among keyword arguments, and a text for `decode`. Runs inside traces.

    Args:
        kwargs: tensors, tuples of tensors, None, booleans, numbers and caches, by name.
        caches: classes whose values stand for the `ForwardContext`'s cache.

    Returns:
        The tensors, and `name=literal`, `name=@0` (a tensor), `name=@0,1` (a tuple of them) or `name=#` (the
        context's cache), joined by `;`.

    Raises:
        CaptureError: a value is none of these.
    """
    tensors: list[Tensor] = []
    options: list[str] = []
    for name, value in kwargs.items():
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
            raise CaptureError(f"a layer got {name} of a type that glowplug can't pass on")
    return tensors, ";".join(options)


def decode(options: str, tensors: list[Tensor], cache: Any = None) -> dict[str, Any]:
    """The keyword arguments that `encode` wrote down."""
    constants, named = _parse(options)
    kwargs = dict(constants)
    for name, places in named:
        if places is None:
            kwargs[name] = cache
        else:
            kwargs[name] = tensors[places] if isinstance(places, int) else tuple(tensors[place] for place in places)
    return kwargs


Places = int | tuple[int, ...] | None


@lru_cache(maxsize=4096)
def _parse(options: str) -> tuple[tuple[tuple[str, Any], ...], tuple[tuple[str, Places], ...]]:
    """The constant keyword arguments; and where the tensors of the others are, None for the cache."""
    constants: list[tuple[str, Any]] = []
    named: list[tuple[str, Places]] = []
    for option in options.split(";") if options else ():
        name, _, text = option.partition("=")
        if text == CONTEXT_CACHE:
            named.append((name, None))
        elif not text.startswith("@"):
            constants.append((name, ast.literal_eval(text)))
        elif "," in text:
            named.append((name, tuple(int(place) for place in text[1:].split(",") if place)))
        else:
            named.append((name, int(text[1:])))
    return tuple(constants), tuple(named)
