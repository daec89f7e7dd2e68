"""Groups the layers of a transformers model whose op bodies are worth compiling: opaque experts, and attention
that eagerly runs several kernels (a model's own function, with sinks or a bias). Checked on transformers 5.17 and 5.23.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from glowplug.bodies.form import ATTENTION, CallForm, Forms
from glowplug.bodies.group import Group
from glowplug.errors import NotStorableError
from glowplug.frontends.hf.discover import Shadow
from glowplug.layers.reads import LOADING, hooks_of
from glowplug.layers.registry import LayerRegistry
from glowplug.layers.stack import describe_layers
from glowplug.layers.structure import structure_of
from glowplug.ops.arguments import parse
from glowplug.ops.attention import ATTENTION_FN_ATTR
from glowplug.store.address import class_modules, modules_of, sources_of

_IMPLEMENTATION = {"cpu": "batched_mm", "cuda": "grouped_mm"}
"""The experts implementation that compiles to the fastest body. On a CPU, a compiled `batched_mm` took half the time of
`grouped_mm` for one token; on an H200, a compiled `grouped_mm` took three fifths of the time for gpt-oss-120b."""


def body_groups(registry: LayerRegistry, forms: Forms) -> list[Group]:
    """The groups of layers whose op bodies are worth compiling.

    Args:
        registry: the model's layers.
        forms: how the traced layers are called; a layer that was not traced is called like those of its structure.
    """
    groups = []
    for op in dict.fromkeys(form.op for form in forms.values() if form is not None):
        for names, description, attend in _alike(registry, registry.order(op)):
            layers = tuple(registry[name] for name in names)
            distinct = {forms[name] for name in names if name in forms}
            form = distinct.pop() if len(distinct) == 1 else None
            if form is None or (op == ATTENTION and attend in (None, *ALL_ATTENTION_FUNCTIONS.values())):
                continue  # each of transformers' own attention functions is a single kernel
            own = _own_attention(attend, form) if op == ATTENTION else _own_experts
            address = _address(layers[0], form, attend if op == ATTENTION else None)
            groups.append(Group(form, names, layers, description, own, partial(_stand_in, layers[0]), address))
    return groups


def _alike(registry: LayerRegistry, names: Sequence[str]) -> list[tuple[tuple[str, ...], str, Any]]:
    """Layers without hooks, grouped by structure and attention function: (names, structure, function) of each group."""
    groups: dict[tuple[str, Any], list[str]] = {}
    for name, description in zip(names, describe_layers([registry[name] for name in names]), strict=True):
        if not hooks_of(registry[name]):
            attend = registry[name].__dict__.get(ATTENTION_FN_ATTR)
            groups.setdefault((description, attend), []).append(name)
    return [(tuple(alike), description, attend) for (description, attend), alike in groups.items()]


def _own_experts(layer: Any, *tensors: Tensor) -> Tensor:
    output: Tensor = layer.forward(*tensors)
    return output


def _own_attention(attend: Callable[..., Any], form: CallForm) -> Callable[..., Tensor]:
    constants, places = parse(form.constants)
    options, extra_names = dict(constants), [name for name, _ in places]

    def own(layer: Any, *tensors: Tensor) -> Tensor:
        output: Tensor = attend(layer, *tensors[:4], **options, **dict(zip(extra_names, tensors[4:], strict=True)))[0]
        return output.contiguous()

    return own


def _stand_in(layer: nn.Module) -> nn.Module:
    """A copy of the layer that uses the experts implementation of `_IMPLEMENTATION`."""
    shadow = Shadow(layer)
    shadow.put_in_force(experts=_IMPLEMENTATION.get(next(layer.parameters()).device.type))
    return shadow.root


def _address(layer: nn.Module, form: CallForm, attend: Callable[..., Any] | None) -> str | None:
    """A hash of everything that a body depends on except the compiler; None if the layer can't be described."""
    files = [inspect.getsourcefile(inspect.unwrap(attend)) or ""] if attend is not None else []
    try:
        facts = [
            transformers.__version__,
            _IMPLEMENTATION.get(next(layer.parameters()).device.type),
            f"{attend.__module__}.{attend.__qualname__}" if attend is not None else None,
            form.to_facts(),
            structure_of(layer, LOADING),
            sorted(sources_of(class_modules(layer) | modules_of(files)).items()),
        ]
    except NotStorableError:
        return None
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
