"""The kind of each layer of a stack: layers of one kind compute the same of (inputs, own weights, own handle).

What a layer's forward can read tells kinds apart: code, shapes, hooks, attributes. Whether it *does* read an attribute
only a trace says. So kinds may leave out the attributes in which layers differ, until a trace has read them.
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
    """Something of a layer that its forward can read.

    Attributes:
        text: equal where it does the same.
        value: what it is.
        owner: of an attribute that kinds may leave out, the object that has it.
        name: its name.
    """

    text: str
    value: Any
    owner: Any = None
    name: str = ""


Facts = dict[str, Fact]
"""Where it lies in the layer, such as `mlp.scale` -> the fact."""


@dataclass(frozen=True)
class Unread:
    """The attributes in which layers differ and that their kinds leave out, as no trace has read them yet.

    Attributes:
        attributes: (id of the object that has it, its name) -> where it lies in a layer.
        values: id of a value that code may reach by another way -> where it lies in a layer.
    """

    attributes: Mapping[tuple[int, str], str] = field(default_factory=dict)
    values: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerFacts:
    """What the layers of a stack are told apart by.

    Attributes:
        layers: the layers.
        columns: what code outside of the layers may look up for each of them: place -> an entry a layer.
        model: ids of the model's modules.
        strict: no trace tells what the layers read.
        caches: whether attributes that name the layer are handed to caches.
    """

    layers: Sequence[nn.Module]
    columns: Mapping[str, Sequence[Fact]] = field(default_factory=dict)
    model: Collection[int] = ()
    strict: bool = False
    caches: bool = True
    _known: dict[int, tuple[Any, str]] = field(default_factory=dict)
    _computed: dict[tuple[Any, ...], frozenset[str]] = field(default_factory=dict)

    def of(self, index: int) -> Facts:
        """Everything that a layer's forward can read, but for what merely names the layer and the weights' values."""
        layer = self.layers[index]
        describer = Describer(layer, self.model, self._known)
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
        """The attributes of a module that merely name the layer, or only print it."""
        printed = PRINTED if self.strict else frozenset()
        if not self.caches:
            return printed
        if not mentions(type(module)):  # type: ignore[arg-type]
            return NAMING | printed
        key = tuple((path, type(part), "forward" in part.__dict__) for path, part in module.named_modules())
        if key not in self._computed:
            self._computed[key] = computed_with(module)
        return (NAMING - self._computed[key]) | printed


def tell_apart(layers: Sequence[Facts], told: Collection[str] | None) -> tuple[tuple[int, ...], Unread]:
    """The kind of each layer, as a number: equal numbers mean the same function of (inputs, own weights, own handle).

    Args:
        layers: the facts of each.
        told: the places of attributes that a trace has read. Others in which layers differ are left out, and returned.
            None: nothing is left out.
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
        for index, fact in enumerate(column if varies and told is not None and place not in told else ()):
            if fact is not None and fact.owner is not None:
                columns[-1][index] = ""
                attributes[id(fact.owner), fact.name] = place
                if not isinstance(fact.value, _CONSTANTS):
                    values[id(fact.value)] = place
    numbers: dict[tuple[str | None, ...], int] = {}
    rows = list(zip(*columns, strict=True)) or [()] * len(layers)
    return tuple(numbers.setdefault(row, len(numbers)) for row in rows), Unread(attributes, values)


_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)
"""Each way to such a value is a read of its own, even where two ways lead to the same object."""
_MANY = 10**6


def difference(few: Mapping[int, Facts], unread: Unread, name_of: Callable[[int, str], str]) -> str | None:
    """What keeps layers apart, shown on the two that differ least; None when nothing does.

    Args:
        few: the index and the facts of a layer of each kind.
        unread: what their kinds leave out.
        name_of: gives the qualified name of what a layer has at a path.
    """
    ignored = set(unread.attributes.values())
    found = {(a, b): _differing(few[a], few[b], ignored) for b in few for a in few if a < b}
    if not found:
        return None
    one, other = min(found, key=lambda pair: len(found[pair]) or _MANY)
    places = found[one, other][:2]
    words = [word for place in places for word in _words(few[one].get(place), few[other].get(place), place)]
    return f"layers {one} and {other} differ in {'; '.join(words)}{_use(few[one], places, one, name_of)}"


def _words(one: Fact | None, other: Fact | None, place: str) -> list[str]:
    is_class = place.endswith(":")
    label = f"{place[:-1] or 'themselves'} being a" if is_class else place
    words = [f"{label} {shown(fact.value)}" for fact in (one, other) if fact is not None]
    if len(words) == 1:
        return [f"{words[0]}, which only one of them has"[:160]]
    return (
        [f"{words[0]}, each of a class of its own"] if is_class and words[0] == words[1] else [w[:120] for w in words]
    )


def _use(facts: Facts, places: Sequence[str], layer: int, name_of: Callable[[int, str], str]) -> str:
    """How the layers use the attributes in which they differ."""
    attributes = [place for place in places if place in facts and facts[place].owner is not None]
    if any(place.rpartition(".")[2] in NAMING for place in attributes):
        return ", which their code computes with"
    if any(repr(name_of(layer, place.rpartition(".")[0])) in shown(facts[place].value) for place in attributes):
        return ": the layers read their own name"
    return ", which their forward reads" if attributes else ""


def _differing(one: Facts, other: Facts, ignored: Collection[str]) -> list[str]:
    """Places that differ: first those that both have."""
    both = [place for place in one if place in other and one[place].text != other[place].text and place not in ignored]
    return both + [place for place in {**one, **other} if (place in one) != (place in other)]
