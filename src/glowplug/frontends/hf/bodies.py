"""The groups of a transformers model's layers that get a compiled body: opaque experts, and attention that is several
kernels in eager mode (a model's own function, with sinks or a bias). Checked on transformers 5.17 and 5.23.
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
"""The experts implementation whose body is worth compiling. On a CPU a compiled `batched_mm` took half the time of
`grouped_mm`, at one token; on an H200 a compiled `grouped_mm` three fifths, for gpt-oss-120b."""


def body_groups(registry: LayerRegistry, forms: Forms) -> list[Group]:
    """The groups of a model's layers that are worth a body.

    Args:
        registry: the model's layers.
        forms: how the layers that were traced are called; others of the same structure are taken to be called alike.
    """
    groups = []
    for op in dict.fromkeys(form.op for form in forms.values() if form is not None):
        for names, described in _alike(registry, registry.order(op)):
            layers = tuple(registry[name] for name in names)
            ways = {forms[name] for name in names if name in forms}
            form = ways.pop() if len(ways) == 1 else None
            attend: Any = layers[0].__dict__.get(ATTENTION_FN_ATTR)
            if form is None or (op == ATTENTION and (attend is None or attend in ALL_ATTENTION_FUNCTIONS.values())):
                continue  # functions of transformers' own are one kernel each
            own = _own_attention(attend, form) if op == ATTENTION else _own_experts
            address = _address(layers[0], form, attend if op == ATTENTION else None)
            groups.append(Group(form, names, layers, described, own, partial(_stand_in, layers[0]), address))
    return groups


def _alike(registry: LayerRegistry, names: Sequence[str]) -> list[tuple[tuple[str, ...], str]]:
    """Names of layers of each structure, and what it is told by. Layers with hooks are of none."""
    groups: dict[tuple[str, Any], list[str]] = {}
    for name, described in zip(names, describe_layers([registry[name] for name in names]), strict=True):
        if not hooks_of(registry[name]):
            attend = registry[name].__dict__.get(ATTENTION_FN_ATTR)
            groups.setdefault((described, attend), []).append(name)
    return [(tuple(alike), described) for (described, _), alike in groups.items()]


def _own_experts(layer: Any, *tensors: Tensor) -> Tensor:
    output: Tensor = layer.forward(*tensors)
    return output


def _own_attention(attend: Callable[..., Any], form: CallForm) -> Callable[..., Tensor]:
    constants, places = parse(form.constants)
    fixed, further = dict(constants), [name for name, _ in places]

    def own(layer: Any, *tensors: Tensor) -> Tensor:
        output: Tensor = attend(layer, *tensors[:4], **fixed, **dict(zip(further, tensors[4:], strict=True)))[0]
        return output.contiguous()

    return own


def _stand_in(layer: nn.Module) -> nn.Module:
    """A layer with the implementation that is best compiled."""
    shadow = Shadow(layer)
    shadow.put_in_force(experts=_IMPLEMENTATION.get(next(layer.parameters()).device.type))
    return shadow.root


def _address(layer: nn.Module, form: CallForm, attend: Callable[..., Any] | None) -> str | None:
    """What a body depends on besides its compiler, hashed; None when it can't be described."""
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
