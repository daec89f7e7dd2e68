"""The template of a model: a short model that shares its weights, and where they lie in the deep one."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from glowplug.errors import AttributesReadError, NotStampableError
from glowplug.graph.capture import Captured
from glowplug.graph.split import LayerOf
from glowplug.graph.stamp import Locations
from glowplug.layers.registry import LayerRegistry
from glowplug.layers.stack import LayerStack, choose_template, why_distinct, why_not_repeated
from glowplug.ops.layer_op import find_layer_op
from glowplug.program.build import Stamping
from glowplug.program.plan import Binder
from glowplug.reasons import named

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
    short = at = _shallow(model)
    for part in filter(None, template.stack.path.split(".")):
        at._modules[part] = child = _shallow(_child(at, part))
        at = child
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
    names = "|".join(map(re.escape, sorted(unread.names)))
    mention = re.compile(rf"\.(?:__dict__\[')?({names})\b(?!\()")
    found: set[str] = set()
    for read in reads:
        source = read[5:-1] if read.startswith("type(") and read.endswith(")") else read
        for match in mention.finditer(source):
            owner = _evaluate(source[: match.start()], model)
            if owner is None:  # who knows whose it is
                found |= {place for (_, name), place in unread.attributes.items() if name == match[1]}
            elif (id(owner), match[1]) in unread.attributes:
                found.add(unread.attributes[id(owner), match[1]])
        if source.endswith(".__dict__"):  # all of an object's attributes
            owner = _evaluate(source.removesuffix(".__dict__"), model)
            found |= {place for (holder, _), place in unread.attributes.items() if holder == id(owner)}
        if unread.values and source.startswith("G["):
            place = unread.values.get(id(_evaluate(source, model)))
            found |= {place} if place is not None else set()
    if found:
        raise AttributesReadError(frozenset(found))


_ROOT = re.compile(r"[LG]\['")


def _evaluate(source: str, model: nn.Module) -> Any:
    """What lies at a source, or at the end of one that breaks off inside of calls; None when that can't be told."""
    for root in _ROOT.finditer(source):
        try:
            return eval(source[root.start() :], {"__builtins__": {}}, {"L": {"model": model}, "G": _Globals()})
        except Exception:
            continue
    return None


class _Globals(dict[str, Any]):
    """The names under which a trace knows other files."""

    def __missing__(self, name: str) -> Any:
        return sys.modules[name.removeprefix("__import_").replace("_dot_", ".")]


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
    prefix = "L['model']." + (f"{stack.path}." if stack.path else "")

    def find(node: fx.Node) -> int | None:
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            index = path[len(prefix) :].partition(".")[0] if path.startswith(prefix) else ""
            if index.isdigit():
                return int(index)
        return None

    return find


def _source(stack: LayerStack) -> str:
    """What the source of anything that lies in a stack contains."""
    attribute = stack.path.rpartition(".")[2]
    return f"._modules['{attribute}']._modules['" if attribute else "L['model']._modules['"


def _child(module: nn.Module, name: str) -> nn.Module:
    child = module._modules[name]
    assert child is not None
    return child


def _shallow(module: nn.Module) -> nn.Module:
    """A module with the same attributes and children, in tables of its own."""
    made: nn.Module = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    made.__dict__["_modules"] = dict(module._modules)
    return made


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
        if not aliases and _source(stack) in entry.source:
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
