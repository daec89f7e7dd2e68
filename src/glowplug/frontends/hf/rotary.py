"""Rotary embeddings whose tables change with the length of the sequence (`dynamic`, `longrope`): which modules they
are, and what traces see in the place of their forward. Checked on transformers 5.17 and 5.23.

Such a module asks in Python for the largest position, and keeps what it worked out: no trace can hold that. It runs
whole, as in eager, behind `glowplug::rotary`; so whatever it holds is always followed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glowplug.errors import CaptureError
from glowplug.layers.copies import shallow_copy
from glowplug.ops.rotary import Form, rotary, tables_of

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
