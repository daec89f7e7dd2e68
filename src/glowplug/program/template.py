"""The template of a model: a short model that shares the deep model's weights, and where its inputs lie there."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from glowplug.errors import AttributesReadError, NotStampableError
from glowplug.graph.capture import Captured
from glowplug.graph.sources import Source, attributes_in, lies_in, module_path, named, parse
from glowplug.graph.split import LayerOf
from glowplug.graph.stamp import Locations
from glowplug.layers.copies import shallow_copy
from glowplug.layers.registry import LayerRegistry
from glowplug.layers.stack import LayerStack, choose_template, why_distinct, why_not_repeated
from glowplug.ops.layer_op import find_layer_op
from glowplug.program.build import Stamping
from glowplug.program.plan import Binder

_DEEP = 16


@dataclass(frozen=True)
class Template:
    """The first `length` layers of a stack, which are traced in the place of all."""

    stack: LayerStack
    length: int

    @property
    def kinds(self) -> tuple[int, ...]:
        """The kinds of the template's layers."""
        return self.stack.kinds[: self.length]

    def layer_names(self, layers: tuple[int, ...]) -> tuple[str, ...]:
        """Qualified names of layers."""
        return tuple(map(self.stack.name_of, layers))


def choose(stack: LayerStack, deep: int = _DEEP) -> Template | None:
    """The template of a stack; None if the stack is no deeper than its template would be. A stack of more than `deep`
    layers must have a template.

    Raises:
        NotStampableError: the stack is deep, but its layers differ too much.
    """
    length = choose_template(stack.kinds)
    if length is not None:
        return Template(stack, length)
    depth, distinct = len(stack.kinds), len(set(stack.kinds))
    if 2 * distinct > depth > 4:
        raise NotStampableError(why_distinct(stack))
    if depth > min(4 * distinct, deep):
        raise NotStampableError(why_not_repeated(stack))
    return None


def short_model(model: nn.Module, template: Template, layers: Sequence[int] | None = None) -> nn.Module:
    """A copy of a model with only the template's layers, or some of them. It shares modules and weights with `model`,
    unchanged."""
    short = at = shallow_copy(model)
    for part in filter(None, template.stack.path.split(".")):
        at._modules[part] = at = shallow_copy(at._modules[part])  # type: ignore[arg-type]
    kept = range(template.length) if layers is None else layers
    at._modules = {str(place): template.stack.layers[index] for place, index in enumerate(kept)}
    return short


def check_reads(model: nn.Module, template: Template, reads: Collection[str]) -> None:
    """Refuse a template whose trace, by the sources in `reads`, read an attribute that its layers' kinds leave out.

    Raises:
        AttributesReadError: the trace read such attributes.
    """
    unread = template.stack.unread
    if not unread.attributes:
        return
    places: set[str] = set()
    names = {name for _, name in unread.attributes}
    for read in reads:
        for owner, name in attributes_in(read, names):
            holder = _at(owner, model)
            place = unread.attributes.get((id(holder), name))
            if place is not None:
                places.add(place)
            elif holder is None:  # it may be any object with such an attribute
                places |= {place for (_, attribute), place in unread.attributes.items() if attribute == name}
            elif name == "__dict__":  # all attributes of this object
                places |= {place for (owner_id, _), place in unread.attributes.items() if owner_id == id(holder)}
        source = parse(read) if unread.values else None
        if source is not None and source.is_global:
            with contextlib.suppress(LookupError):
                passed = map(id, source.objects({}))
                places |= {unread.values[key] for key in passed if key in unread.values}
    if places:
        raise AttributesReadError(frozenset(places))


def _at(source: Source | None, model: nn.Module) -> Any:
    """The object at a source; None if that is unknown."""
    if source is None:
        return None
    try:
        return source.value({"model": model})
    except LookupError:
        return None


def layer_of(template: Template, captured: Captured) -> LayerOf | None:
    """Finds the layer of a node, to cut a template's graph at its layers; None if every layer has a splitting op."""
    stack = template.stack
    handles = {entry.node: stack.index_of(entry.value.name) for entry in captured.inputs if entry.type == "handle"}
    cut = set()
    for node in captured.gm.graph.nodes:
        op = find_layer_op(node.target) if node.op == "call_function" else None
        if op is not None and op.splitting:
            place = handles.get(getattr(node.args[0], "name", ""))
            cut.add(place[0] if place is not None else None)
    if cut == set(range(template.length)):
        return None

    return functools.partial(traced_in, stack)


def traced_in(stack: LayerStack, node: fx.Node) -> int | None:
    """The layer of a stack in which a node was traced; None outside the stack."""
    entries = (node.meta.get("nn_module_stack") or {}).values()
    places = (stack.index_of(module_path(path)) for path, _ in entries)
    return next((place[0] for place in places if place is not None), None)


def stamping(
    model: nn.Module, template: Template, captured: Captured, arguments: Mapping[str, str], registry: LayerRegistry
) -> Stamping:
    """How to stamp the template's graph over the model's stack.

    Raises:
        NotStampableError: a weight can't be located.
    """
    stack = template.stack
    own, handles = _locate(model, stack, captured, arguments)
    outside = frozenset(entry.node for entry in captured.inputs if entry.node not in own)
    binder = Binder(stack.path, stack.layers, registry, handles)
    return Stamping(Locations(own, outside), template.kinds, stack.kinds, binder)


def _locate(
    model: nn.Module, stack: LayerStack, captured: Captured, arguments: Mapping[str, str]
) -> tuple[dict[str, tuple[int, str]], frozenset[str]]:
    """Graph value -> (layer, path in it) for weights and handles in the stack; and the paths that are handles."""
    names = tensor_names(model)
    own: dict[str, tuple[int, str]] = {}
    handles = set()
    for entry in captured.inputs:
        if entry.node in arguments or entry.type == "symint":
            continue
        if entry.type == "handle":
            place = stack.index_of(entry.value.name)
            if place is not None:
                own[entry.node] = place
                handles.add(place[1])
            continue
        aliases = names.get(id(entry.value), [])
        places = [place for place in map(stack.index_of, aliases) if place is not None]
        layers = sorted({layer for layer, _ in places})
        if not aliases and lies_in(entry.source, stack.path):
            raise NotStampableError(f"a layer reads a tensor that is no attribute of a module: {named(entry.source)}")
        if len(layers) == 1:
            own[entry.node] = places[0]
        elif layers and not all(
            {(layer, path) for layer in range(len(stack.layers))} <= set(places) for _, path in places
        ):
            raise NotStampableError(f"layers {', '.join(map(str, layers))} share {places[0][1]}", tuple(layers))
    return own, frozenset(handles)


def tensor_names(model: nn.Module) -> dict[int, list[str]]:
    """Id of each tensor of a model -> all qualified names of the tensor."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers, module.__dict__):
            for name, value in table.items():
                if isinstance(value, Tensor):
                    names.setdefault(id(value), []).append(f"{path}.{name}" if path else name)
    return names
