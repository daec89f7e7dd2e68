"""What traces see in the place of a token mixer's forward: a call of `glowplug::mixer`, whose inside is not traced."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from glowplug.errors import CaptureError
from glowplug.ops.arguments import encode
from glowplug.ops.mixer import mixer, mixer_handing_on


@functools.lru_cache(maxsize=256)
def mixer_entry(cls: type[nn.Module]) -> Callable[..., Any]:
    """The forward that stands in for that of a class of mixers.

    Of a tuple of outputs the second is given as None, as attention weights are when nobody asked for them. A tensor
    behind it (what sparse attention chose, for the next layer) is handed on from op to op, and never computed with.
    """
    names = tuple(name for name in inspect.signature(cls.forward).parameters if name not in ("self", "kwargs", "args"))
    try:
        further = _further_outputs(cls)
    except CaptureError as exc:
        return _refusal(str(exc))

    def entry(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False))
        given.update(kwargs)
        if "hidden_states" not in given:
            raise CaptureError(f"the forward of {cls.__name__} takes no hidden_states")
        hidden_states, mask = given.pop("hidden_states"), given.get("attention_mask")
        if isinstance(mask, Tensor):
            del given["attention_mask"]
        else:
            mask = None  # several masks are tensors among others
        tensors, options = encode(given, Cache)
        if further is None:
            return mixer(layer, hidden_states, mask, tensors, options)
        if not any(further):
            return (mixer(layer, hidden_states, mask, tensors, options), *(None for _ in further))
        output, handed = mixer_handing_on(layer, hidden_states, mask, tensors, options, further.index(True) + 1)
        return (output, *(handed if is_tensor else None for is_tensor in further))

    return entry


def _refusal(reason: str) -> Callable[..., Any]:
    """A forward that can't be traced. It may never be: a mixer inside of another runs with that one."""

    def refuse(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise CaptureError(reason)

    return refuse


def _further_outputs(cls: type[nn.Module]) -> tuple[bool, ...] | None:
    """Of each output behind the first, whether it is a tensor to hand on; None when the forward gives only one."""
    try:
        annotation = typing.get_type_hints(cls.forward).get("return")
    except (NameError, TypeError):
        annotation = None
    choices = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    found = next((choice for choice in choices if typing.get_origin(choice) is tuple), None)
    if found is None:
        if inspect.signature(cls.forward).return_annotation is inspect.Signature.empty:
            returned = _returned(cls, 0)
            if returned > 1:
                raise CaptureError(f"{cls.__name__} hands on what glowplug can't tell besides its output")
            return (False,) * returned or None
        text = str(inspect.signature(cls.forward).return_annotation).lower()
        return (False,) if "tuple" in text else None
    outputs = typing.get_args(found)[1:]
    if not outputs or Ellipsis in outputs:
        return (False,)
    further = (False, *("Tensor" in str(output) for output in outputs[1:]))
    further = further[: _returned(cls, len(further))]
    if sum(further) > 1:
        raise CaptureError(f"{cls.__name__} hands on more than one tensor besides its output")
    return further


def _returned(cls: type[nn.Module], annotated: int) -> int:
    """How many outputs behind the first a forward's source returns, where its annotation has more."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    except (OSError, TypeError, SyntaxError):
        return annotated
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    counts = {len(value.elts) - 1 for value in returned if isinstance(value, ast.Tuple)}
    return counts.pop() if len(counts) == 1 else annotated


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)
