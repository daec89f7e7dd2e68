"""The template of a model: a short model that shares its weights, and where they lie in the deep one."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
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
"""Layers of a transformers model that is deep, whatever its kinds: that it has no template needs a reason."""


@dataclass(frozen=True)
class Template:
    """The layers of a stack that are traced.

    Attributes:
        stack: the stack.
        length: how many of its layers, from the first.
    """

    stack: LayerStack
    length: int

    @property
    def kinds(self) -> tuple[int, ...]:
        """The kinds of its layers."""
        return self.stack.kinds[: self.length]

    def layer_names(self, layers: tuple[int, ...]) -> tuple[str, ...]:
        """Qualified names of layers."""
        return tuple(map(self.stack.name_of, layers))


def choose(stack: LayerStack, deep: int = _DEEP) -> Template | None:
    """The template of a stack; None when the stack is no deeper than its template would be.

    Args:
        stack: the stack.
        deep: layers of a stack that is deep, whatever its kinds: that it has no template needs a reason.

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


def short_model(model: nn.Module, template: Template) -> nn.Module:
    """A model of the template's layers alone. It shares every module and weight with `model`, which stays as it is."""
    short = at = shallow_copy(model)
    for part in filter(None, template.stack.path.split(".")):
        at._modules[part] = at = shallow_copy(at._modules[part])  # type: ignore[arg-type]
    at._modules = {str(index): layer for index, layer in enumerate(template.stack.layers[: template.length])}
    return short


def check_reads(model: nn.Module, template: Template, reads: Collection[str]) -> None:
    """Refuse a template whose trace read an attribute that its layers' kinds leave out.

    Args:
        model: the deep model.
        template: the template.
        reads: sources of what the trace read.

    Raises:
        AttributesReadError: it read some.
    """
    unread = template.stack.unread
    if not unread.attributes:
        return
    found: set[str] = set()
    names = {name for _, name in unread.attributes}
    for read in reads:
        for owner, name in attributes_in(read, names):
            holder = _at(owner, model)
            place = unread.attributes.get((id(holder), name))
            if place is not None:
                found.add(place)
            elif holder is None or name == "__dict__":  # any object that has such an attribute; all that this one has
                found |= {
                    place
                    for (held_by, attribute), place in unread.attributes.items()
                    if (attribute == name if holder is None else held_by == id(holder))
                }
        source = parse(read) if unread.values else None
        if source is not None and source.is_global:
            with contextlib.suppress(LookupError):
                passed = map(id, source.objects({}))
                found |= {unread.values[key] for key in passed if key in unread.values}
    if found:
        raise AttributesReadError(frozenset(found))


def _at(source: Source | None, model: nn.Module) -> Any:
    """What lies at a source; None when that can't be told."""
    if source is None:
        return None
    try:
        return source.value({"model": model})
    except LookupError:
        return None


def layer_of(template: Template, captured: Captured) -> LayerOf | None:
    """Where to cut a template's graph besides its splitting ops: at its layers, unless each of them has such an op."""
    stack = template.stack
    handles = {entry.node: stack.index_of(entry.value.name) for entry in captured.inputs if entry.kind == "handle"}
    cut = set()
    for node in captured.gm.graph.nodes:
        op = find_layer_op(node.target) if node.op == "call_function" else None
        if op is not None and op.splitting:
            place = handles.get(getattr(node.args[0], "name", ""))
            cut.add(place[0] if place is not None else None)
    if cut == set(range(template.length)):
        return None

    def find(node: fx.Node) -> int | None:
        entries = (node.meta.get("nn_module_stack") or {}).values()
        places = (stack.index_of(module_path(path)) for path, _ in entries)
        return next((place[0] for place in places if place is not None), None)

    return find


def stamping(
    model: nn.Module, template: Template, captured: Captured, arguments: Mapping[str, str], registry: LayerRegistry
) -> Stamping:
    """Everything that stamping the template's graph needs to know of the model.

    Raises:
        NotStampableError: a weight's place can't be told.
    """
    stack = template.stack
    own, handles = _locate(model, stack, captured, arguments)
    outside = frozenset(entry.node for entry in captured.inputs if entry.node not in own)
    binder = Binder(stack.path, stack.layers, registry, handles)
    return Stamping(Locations(own, outside), template.kinds, stack.kinds, binder)


def _locate(
    model: nn.Module, stack: LayerStack, captured: Captured, arguments: Mapping[str, str]
) -> tuple[dict[str, tuple[int, str]], frozenset[str]]:
    """Graph value -> (layer, path in it) for what lies in the stack; and which of the paths are handles."""
    names = tensor_names(model)
    own: dict[str, tuple[int, str]] = {}
    handles = set()
    for entry in captured.inputs:
        if entry.node in arguments or entry.kind == "symint":
            continue
        if entry.kind == "handle":
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
    """Of a model: id of a tensor -> every qualified name that it has."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in _tensors(module):
            names.setdefault(id(tensor), []).append(f"{path}.{name}" if path else name)
    return names


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for table in (module._parameters, module._buffers, module.__dict__):
        for name, value in table.items():
            if isinstance(value, Tensor):
                yield name, value
