"""What traces see in the place of the forward of modules that they can't follow, and which modules those are: a token
mixer becomes a call of `glowplug::mixer`, a rotary embedding whose tables change with the length of the sequence
(`dynamic`, `longrope`) one of `glowplug::rotary`. Checked on transformers 5.17 and 5.23.

Such a rotary module asks in Python for the largest position, and keeps what it worked out: no trace can hold that. It
runs whole, as in eager; so whatever it holds is always followed.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from glowplug.errors import CaptureError
from glowplug.layers.copies import shallow_copy
from glowplug.ops.arguments import encode
from glowplug.ops.mixer import mixer, mixer_handing_on
from glowplug.ops.rotary import Form, rotary, tables_of


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


_UPDATES = "transformers.modeling_rope_utils"
"""Where the decorator lives that rebuilds a module's tables: `dynamic_rope_update`."""
_HIDDEN = 4
_DTYPES = (torch.float32, torch.bfloat16)


def rotary_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The model's rotary embeddings whose tables change with the length of the sequence, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(map(_changes, rope_types(module))) and _is_decorated(type(module))  # type: ignore[arg-type]
    }


def rope_types(module: nn.Module) -> tuple[str, ...]:
    """A rotary module's kinds of rope: one, or one for each type of layers."""
    found = module.__dict__.get("rope_type")
    types = tuple(found.values()) if isinstance(found, Mapping) else (found,)
    return tuple(kind for kind in types if isinstance(kind, str))


def _changes(kind: str) -> bool:
    """Whether transformers rebuilds tables of this kind, as `dynamic_rope_update` tells it."""
    return "dynamic" in kind or kind == "longrope"


@functools.lru_cache(maxsize=1024)
def _is_decorated(cls: type[nn.Module]) -> bool:
    function: Any = getattr(cls, "forward", None)
    while function is not None:
        if getattr(function, "__globals__", {}).get("__name__") == _UPDATES:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def rotary_entry(module: nn.Module) -> Callable[..., Any]:
    """What a trace sees in the place of the module's forward."""
    forms = _forms(module)
    texts = {key: form.to_text() for key, form in forms.items()}
    several = {key: form.several for key, form in forms.items()}
    name = type(module).__name__

    def entry(layer: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        key = (layer_type, position_ids.dim())
        if key not in texts:
            raise CaptureError(f"the rotary embedding {name} gives something that glowplug can't follow")
        tables = rotary(layer, x, position_ids, texts[key])
        return tuple(tables) if several[key] else tables[0]

    return entry


def _forms(module: nn.Module) -> dict[tuple[str | None, int], Form]:
    """What the module gives, by type of layers and number of the positions' dims, as a few short runs of it tell."""
    given = module.__dict__.get("rope_type")
    types: tuple[str | None, ...] = tuple(given) if isinstance(given, Mapping) else (None,)
    asked = {(layer_type, len(shape)): _form(module, layer_type, shape) for layer_type in types for shape in _SHAPES}
    return {key: form for key, form in asked.items() if form is not None}


_SHAPES = ((2, 5), (3, 2, 5))
"""Of positions: `[batch, tokens]`, and those for time, height and width, one below the other."""


def _form(module: nn.Module, layer_type: str | None, shape: tuple[int, ...]) -> Form | None:
    positions = torch.arange(shape[-1]).expand(shape)
    kwargs = {} if layer_type is None else {"layer_type": layer_type}
    outputs = []
    for dtype in _DTYPES:
        try:
            with torch.no_grad():
                x = torch.zeros(*shape[-2:], _HIDDEN, dtype=dtype)
                outputs.append(_stand_in(module).forward(x, positions, **kwargs))
        except Exception:  # whatever a module says to positions of a form that it does not know
            return None
    found = [tables_of(output) for output in outputs]
    if found[0] is None or found[1] is None or len({table.shape[:-1] for table in found[0]}) != 1:
        return None
    lead = tuple(found[0][0].shape[:-1])
    if lead != shape[len(shape) - len(lead) :]:
        return None
    tables = tuple(
        (int(one.shape[-1]), None if one.dtype != other.dtype else str(one.dtype).removeprefix("torch."))
        for one, other in zip(*found, strict=True)
    )
    return Form(layer_type, len(shape) - len(lead), tables, isinstance(outputs[0], tuple))


def _stand_in(module: nn.Module) -> nn.Module:
    """A copy with tables of zeros, on the CPU, whose state is its own: the module may be without memory."""
    made = shallow_copy(module)
    made.__dict__.update({name: _zeros(value) for name, value in module.__dict__.items() if name != "_modules"})
    made.__dict__.pop("forward", None)
    made.__dict__["_buffers"] = {name: _zeros(value) for name, value in module._buffers.items()}
    made.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    return made


def _zeros(value: Any) -> Any:
    return torch.zeros(tuple(value.shape), dtype=value.dtype) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def rotary_state_kept(model: nn.Module) -> Iterator[None]:
    """At the end, give the model's rotary embeddings back what they had worked out: a comparison leaves no mark."""
    kept = [(module, _state(module)) for module in rotary_layers(model).values()]
    try:
        yield
    finally:
        for module, (attributes, buffers, values) in kept:
            with torch.inference_mode():  # it lets tensors of either mode be written to
                for tensor, value in values:
                    tensor.copy_(value)
            module._buffers.clear()
            module._buffers.update(buffers)
            for name in module.__dict__.keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)


def _state(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], list[tuple[Tensor, Tensor]]]:
    tensors = [value for value in (*module._buffers.values(), *module.__dict__.values()) if isinstance(value, Tensor)]
    return dict(module.__dict__), dict(module._buffers), [(tensor, tensor.clone()) for tensor in tensors]
