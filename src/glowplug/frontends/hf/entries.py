"""Replaces the forward of modules that a trace can't follow: a token mixer becomes a call of `glowplug::mixer`, and a
rotary embedding whose tables change with the length of the sequence (`dynamic`, `longrope`) a call of
`glowplug::rotary`. Checked on transformers 5.17 and 5.23.

Such a rotary embedding reads the largest position in Python and keeps the tables that it computes, which no trace can
represent. It runs eagerly as a whole, and its state is always up to date.
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
    """The forward that a trace sees in mixers of a class.

    If the mixer returns a tuple, the second output is None, like attention weights that nobody asked for. A tensor
    after it (the choice of sparse attention, for the next layer) is passed from op to op, and nothing computes with it.
    """
    names = tuple(name for name in inspect.signature(cls.forward).parameters if name not in ("self", "kwargs", "args"))
    try:
        further = _further_outputs(cls)
    except CaptureError as exc:
        reason = str(exc)

        def refuse(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            raise CaptureError(reason)  # only if it is traced: a nested mixer runs inside the outer one

        return refuse

    def entry(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(names, args, strict=False))
        arguments.update(kwargs)
        if "hidden_states" not in arguments:
            raise CaptureError(f"the forward of {cls.__name__} takes no hidden_states")
        hidden_states, mask = arguments.pop("hidden_states"), arguments.get("attention_mask")
        if isinstance(mask, Tensor):
            del arguments["attention_mask"]
        else:
            mask = None  # several masks stay among the other arguments
        tensors, options = encode(arguments, Cache)
        if further is None:
            return mixer(layer, hidden_states, mask, tensors, options)
        if not any(further):
            return (mixer(layer, hidden_states, mask, tensors, options), *(None for _ in further))
        output, passed_on = mixer_handing_on(layer, hidden_states, mask, tensors, options, further.index(True) + 1)
        return (output, *(passed_on if is_tensor else None for is_tensor in further))

    return entry


def _further_outputs(cls: type[nn.Module]) -> tuple[bool, ...] | None:
    """For each output after the first, whether it is a tensor to pass on; None if there is only one output."""
    try:
        annotation = typing.get_type_hints(cls.forward).get("return")
    except (NameError, TypeError):
        annotation = None
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    choices = typing.get_args(annotation) if is_union else (annotation,)
    tuple_type = next((choice for choice in choices if typing.get_origin(choice) is tuple), None)
    if tuple_type is None:
        if inspect.signature(cls.forward).return_annotation is inspect.Signature.empty:
            returned = _returned(cls, 0)
            if returned > 1:
                raise CaptureError(f"{cls.__name__} hands on what glowplug can't tell besides its output")
            return (False,) * returned or None
        text = str(inspect.signature(cls.forward).return_annotation).lower()
        return (False,) if "tuple" in text else None
    outputs = typing.get_args(tuple_type)[1:]
    if not outputs or Ellipsis in outputs:
        return (False,)
    further = (False, *("Tensor" in str(output) for output in outputs[1:]))
    further = further[: _returned(cls, len(further))]
    if sum(further) > 1:
        raise CaptureError(f"{cls.__name__} hands on more than one tensor besides its output")
    return further


def _returned(cls: type[nn.Module], annotated: int) -> int:
    """How many outputs after the first the source of the forward returns; `annotated` if that is unclear."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    except (OSError, TypeError, SyntaxError):
        return annotated
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    counts = {len(value.elts) - 1 for value in returned if isinstance(value, ast.Tuple)}
    return counts.pop() if len(counts) == 1 else annotated


_UPDATES = "transformers.modeling_rope_utils"
"""The module of `dynamic_rope_update`, the decorator that rebuilds a rotary embedding's tables."""
_HIDDEN = 4
_DTYPES = (torch.float32, torch.bfloat16)
_SHAPES = ((2, 5), (3, 2, 5))
"""Shapes of positions: `[batch, tokens]`, and the same for each of time, height and width."""


def rotary_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The model's rotary embeddings whose tables change with the length of the sequence, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if any("dynamic" in rope or rope == "longrope" for rope in rope_types(module)) and _is_decorated(type(module))  # type: ignore[arg-type]
    }


def rope_types(module: nn.Module) -> tuple[str, ...]:
    """The types of a module's rotary tables: one, or one for each layer type."""
    types = module.__dict__.get("rope_type")
    return tuple(rope for rope in (types.values() if isinstance(types, Mapping) else (types,)) if isinstance(rope, str))


@functools.lru_cache(maxsize=1024)
def _is_decorated(cls: type[nn.Module]) -> bool:
    function: Any = getattr(cls, "forward", None)
    while function is not None:
        if getattr(function, "__globals__", {}).get("__name__") == _UPDATES:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def rotary_entry(module: nn.Module) -> Callable[..., Any]:
    """The forward that a trace sees in a rotary embedding."""
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
    """Runs the module to find the form of its output by layer type and number of dims of the positions."""
    rope_type = module.__dict__.get("rope_type")
    layer_types: tuple[str | None, ...] = tuple(rope_type) if isinstance(rope_type, Mapping) else (None,)
    forms = {(name, len(shape)): _form(module, name, shape) for name in layer_types for shape in _SHAPES}
    return {key: form for key, form in forms.items() if form is not None}


def _form(module: nn.Module, layer_type: str | None, shape: tuple[int, ...]) -> Form | None:
    positions = torch.arange(shape[-1]).expand(shape)
    kwargs = {} if layer_type is None else {"layer_type": layer_type}
    outputs = []
    for dtype in _DTYPES:
        try:
            with torch.no_grad():
                x = torch.zeros(*shape[-2:], _HIDDEN, dtype=dtype)
                outputs.append(_stand_in(module).forward(x, positions, **kwargs))
        except Exception:  # the module does not take positions of this shape
            return None
    first, second = map(tables_of, outputs)
    if first is None or second is None or len({table.shape[:-1] for table in first}) != 1:
        return None
    lead = tuple(first[0].shape[:-1])
    if lead != shape[len(shape) - len(lead) :]:
        return None
    tables = tuple(
        (int(one.shape[-1]), None if one.dtype != other.dtype else str(one.dtype).removeprefix("torch."))
        for one, other in zip(first, second, strict=True)
    )
    return Form(layer_type, len(shape) - len(lead), tables, isinstance(outputs[0], tuple))


def _stand_in(module: nn.Module) -> nn.Module:
    """A copy on the CPU with a state of its own and zeros for tables, as the module's tensors may be fake."""
    copied = shallow_copy(module)
    copied.__dict__.update({name: _zeros(value) for name, value in module.__dict__.items() if name != "_modules"})
    copied.__dict__.pop("forward", None)
    copied.__dict__["_buffers"] = {name: _zeros(value) for name, value in module._buffers.items()}
    copied.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    return copied


def _zeros(value: Any) -> Any:
    return torch.zeros(tuple(value.shape), dtype=value.dtype) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def rotary_state_kept(model: nn.Module) -> Iterator[None]:
    """Restore the state of the model's rotary embeddings afterwards, so that a comparison leaves no trace in them."""
    states = [(module, _state(module)) for module in rotary_layers(model).values()]
    try:
        yield
    finally:
        for module, (attributes, buffers, values) in states:
            with torch.inference_mode():  # here, inference tensors and normal ones can both be written to
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
