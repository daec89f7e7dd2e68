"""Decides the kind of each layer of a stack. Layers of one kind compute the same function of (inputs, own weights,
own handle).

Kinds are told apart by everything a layer's forward can read: code, shapes, hooks, attributes. Only a trace shows
whether the forward *does* read an attribute. So kinds may ignore attributes in which layers differ until a trace has
read them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from glowplug.layers.describe import Describer, layout_text, shown
from glowplug.layers.naming import NAMING, computed_with, mentions
from glowplug.layers.reads import PRINTED, attributes_read, hooks_of


@dataclass(frozen=True)
class Fact:
    """Something that a layer's forward can read.

    Attributes:
        text: its description; equal texts mean equal behaviour.
        value: the value itself.
        owner: the object that has it, if it is an attribute that kinds may ignore.
        name: the attribute's name.
    """

    text: str
    value: Any
    owner: Any = None
    name: str = ""


Facts = dict[str, Fact]
"""Place in the layer, such as `mlp.scale` -> the fact."""


@dataclass(frozen=True)
class Unread:
    """Attributes in which layers differ, but which their kinds ignore because no trace has read them yet.

    Attributes:
        attributes: (id of the owner, attribute name) -> place in a layer.
        values: id of a value that code may also reach by another path -> place in a layer.
    """

    attributes: Mapping[tuple[int, str], str] = field(default_factory=dict)
    values: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerFacts:
    """What tells the layers of a stack apart.

    Attributes:
        layers: the layers.
        columns: values that code outside the layers may look up for each layer: place -> one fact per layer.
        model: ids of the model's modules.
        strict: whether no trace will show what the layers read.
        caches: whether the layers may pass attributes that name the layer to caches.
        stack: the stack's qualified name, if the front end binds the names of layers, see `Describer`.
        shared: classes of objects that all layers share.
    """

    layers: Sequence[nn.Module]
    columns: Mapping[str, Sequence[Fact]] = field(default_factory=dict)
    model: Collection[int] = ()
    strict: bool = False
    caches: bool = True
    stack: str | None = None
    shared: tuple[type, ...] = ()
    _known: dict[int, tuple[Any, str]] = field(default_factory=dict)
    _computed: dict[tuple[Any, ...], frozenset[str]] = field(default_factory=dict)

    def of(self, index: int) -> Facts:
        """Everything a layer's forward can read, except weights' values and attributes that merely name the layer."""
        layer = self.layers[index]
        own = ".".join(filter(None, (self.stack, str(index)))) if self.stack is not None else ""
        describer = Describer(layer, self.model, self._known, own=own, shared=self.shared)
        columns = ((place, column[index]) for place, column in self.columns.items())
        facts = {place: replace(fact, text=describer.text(fact.value)) for place, fact in columns}
        for path, module in layer.named_modules(remove_duplicate=False):
            facts |= {f"{path}{place}": fact for place, fact in self._read(module, describer)}
        return facts

    def _read(self, module: nn.Module, describer: Describer) -> Iterator[tuple[str, Fact]]:
        cls, table = type(module), module.__dict__
        yield ":", Fact(f"{cls.__module__}.{cls.__qualname__} {id(cls)}", cls)
        yield ".training", Fact(str(module.training), module.training)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            yield f".{name}", Fact(layout_text(tensor), tensor)
        if "forward" in table:
            yield ".forward", Fact(describer.text(table["forward"]), table["forward"])
        for name, hooks in hooks_of(module).items():
            flags = table[f"{name}_with_kwargs"], module._forward_hooks_always_called
            marks = [[key in flag for flag in flags] for key in hooks]
            yield f".{name}", Fact(f"{describer.text(list(hooks.values()))} {marks}", list(hooks.values()))
        for name, value in attributes_read(module, {"forward", *self._names_only(module)}):
            text = layout_text(value) if isinstance(value, torch.Tensor) else describer.text(value)
            yield f".{name}", Fact(text, value, module, name)

    def _names_only(self, module: nn.Module) -> frozenset[str]:
        """Names of a module's attributes that merely name the layer or serve only to print it."""
        printed = PRINTED if self.strict else frozenset()
        if not self.caches:
            return printed
        if not mentions(type(module)):  # type: ignore[arg-type]
            return NAMING | printed
        key = tuple((path, type(part), "forward" in part.__dict__) for path, part in module.named_modules())
        if key not in self._computed:
            self._computed[key] = computed_with(module)
        return (NAMING - self._computed[key]) | printed


def tell_apart(layers: Sequence[Facts], read: Collection[str] | None) -> tuple[tuple[int, ...], Unread]:
    """The kind of each layer, as a number: equal numbers mean the same function of (inputs, own weights, own handle).

    Args:
        layers: the facts of each layer.
        read: places of the attributes that a trace has read. The kinds ignore other attributes in which layers differ,
            and those are returned. None: the kinds ignore nothing.
    """
    attributes: dict[tuple[int, str], str] = {}
    values: dict[int, str] = {}
    columns: list[list[str | None]] = []
    for place in {place: None for facts in layers for place in facts}:
        column = [facts.get(place) for facts in layers]
        varies = len({fact.text for fact in column if fact is not None}) > 1
        if not varies and None not in column:
            continue
        columns.append([fact.text if fact is not None else None for fact in column])
        for index, fact in enumerate(column if varies and read is not None and place not in read else ()):
            if fact is not None and fact.owner is not None:
                columns[-1][index] = ""
                attributes[id(fact.owner), fact.name] = place
                if not isinstance(fact.value, _CONSTANTS):
                    values[id(fact.value)] = place
    numbers: dict[tuple[str | None, ...], int] = {}
    rows = list(zip(*columns, strict=True)) or [()] * len(layers)
    return tuple(numbers.setdefault(row, len(numbers)) for row in rows), Unread(attributes, values)


_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)
"""Such values are often shared objects: reaching one by another path does not mean that the attribute was read."""
_MANY = 10**6


def difference(few: Mapping[int, Facts], unread: Unread, name_of: Callable[[int, str], str]) -> str | None:
    """Describe how the two layers that differ least differ; None if no layers differ.

    Args:
        few: index -> facts, for one layer of each kind.
        unread: the attributes that the kinds ignore.
        name_of: returns the qualified name for a layer and a path in it.
    """
    ignored = set(unread.attributes.values())
    differing = {(a, b): _differing(few[a], few[b], ignored) for b in few for a in few if a < b}
    if not differing:
        return None
    one, other = min(differing, key=lambda pair: len(differing[pair]) or _MANY)
    places = differing[one, other][:2]
    words = [word for place in places for word in _words(few[one].get(place), few[other].get(place), place)]
    return f"layers {one} and {other} differ in {'; '.join(words)}{_use(few[one], places, one, name_of)}"


def _words(one: Fact | None, other: Fact | None, place: str) -> list[str]:
    is_class = place.endswith(":")
    label = f"{place[:-1] or 'themselves'} being a" if is_class else place
    words = [f"{label} {shown(fact.value)}" for fact in (one, other) if fact is not None]
    if len(words) == 1:
        return [f"{words[0]}, which only one of them has"[:160]]
    if is_class and words[0] == words[1]:
        return [f"{words[0]}, each of a class of its own"]
    return [word[:120] for word in words]


def _use(facts: Facts, places: Sequence[str], layer: int, name_of: Callable[[int, str], str]) -> str:
    """Say how the layers use the attributes in which they differ."""
    attributes = [place for place in places if place in facts and facts[place].owner is not None]
    if any(place.rpartition(".")[2] in NAMING for place in attributes):
        return ", which their code computes with"
    if any(repr(name_of(layer, place.rpartition(".")[0])) in shown(facts[place].value) for place in attributes):
        return ": the layers read their own name"
    return ", which their forward reads" if attributes else ""


def _differing(one: Facts, other: Facts, ignored: Collection[str]) -> list[str]:
    """Places that differ, first those that both layers have."""
    both = [place for place in one if place in other and one[place].text != other[place].text and place not in ignored]
    return both + [place for place in {**one, **other} if (place in one) != (place in other)]
