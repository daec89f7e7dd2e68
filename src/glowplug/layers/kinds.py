"""The kind of each layer of a stack: layers of one kind compute the same of (inputs, own weights, own handle).

What a layer's forward can read tells kinds apart: code, shapes, hooks, attributes. Whether it *does* read an attribute
only a trace says. So kinds may leave out the attributes in which layers differ, until a trace has read them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
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
        shown: the same for a person.
        owner: of an attribute that kinds may leave out, the object that has it.
        name: its name.
        value: its value.
    """

    text: str
    shown: str = ""
    owner: Any = None
    name: str = ""
    value: Any = None

    @property
    def words(self) -> str:
        """What a person reads of it."""
        return self.shown or shown(self.value)


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

    @property
    def names(self) -> frozenset[str]:
        """Names of the attributes."""
        return frozenset(name for _, name in self.attributes)


class LayerFacts:
    """What the layers of a stack are told apart by.

    Args:
        layers: the layers.
        columns: what code outside of the layers may look up for each of them: place -> an entry a layer.
        model: ids of the model's modules.
        strict: no trace tells what the layers read.
        caches: whether attributes that name the layer are handed to caches.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        columns: Mapping[str, Sequence[Fact]] | None = None,
        model: Collection[int] = (),
        *,
        strict: bool = False,
        caches: bool = True,
    ) -> None:
        self._layers = layers
        self._columns = columns or {}
        self._model = model
        self._strict = strict
        self._caches = caches
        self._known: dict[int, tuple[Any, str]] = {}
        self._computed: dict[tuple[Any, ...], frozenset[str]] = {}

    def of(self, index: int) -> Facts:
        """Everything that a layer's forward can read, but for what merely names the layer and the weights' values."""
        layer = self._layers[index]
        describer = Describer(layer, self._model, self._known)
        facts: Facts = {}
        for place, column in self._columns.items():
            fact = column[index]
            facts[place] = Fact(describer.text(fact.value), "", fact.owner, fact.name, fact.value)
        for path, module in layer.named_modules(remove_duplicate=False):
            self._read(path, module, describer, facts)
        return facts

    def _read(self, path: str, module: nn.Module, describer: Describer, facts: Facts) -> None:
        cls, table = type(module), module.__dict__
        facts[f"{path}:"] = Fact(f"{cls.__module__}.{cls.__qualname__} {id(cls)}", f"a {cls.__qualname__}")
        facts[f"{path}.training"] = Fact(str(module.training), str(module.training))
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            facts[f"{path}.{name}"] = Fact(layout_text(tensor), value=tensor)
        if "forward" in table:
            facts[f"{path}.forward"] = Fact(describer.text(table["forward"]), value=table["forward"])
        for name, hooks in hooks_of(module).items():
            flags = table[f"{name}_with_kwargs"], module._forward_hooks_always_called
            marks = [[key in flag for flag in flags] for key in hooks]
            text = f"{describer.text(list(hooks.values()))} {marks}"
            facts[f"{path}.{name}"] = Fact(text, value=list(hooks.values()))
        for name, value in attributes_read(module, {"forward", *self._names_only(module)}):
            text = layout_text(value) if isinstance(value, torch.Tensor) else describer.text(value)
            facts[f"{path}.{name}"] = Fact(text, "", module, name, value)

    def _names_only(self, module: nn.Module) -> frozenset[str]:
        """The attributes of a module that merely name the layer, or only print it."""
        printed = PRINTED if self._strict else frozenset()
        if not self._caches:
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
    texts: dict[str, set[str]] = {}
    for facts in layers:
        for place, fact in facts.items():
            texts.setdefault(place, set()).add(fact.text)
    varying = {place for place, found in texts.items() if len(found) > 1}
    attributes: dict[tuple[int, str], str] = {}
    values: dict[int, str] = {}
    numbers: dict[frozenset[tuple[str, str]], int] = {}
    kinds = []
    for facts in layers:
        differing = set()
        for place, fact in facts.items():
            if place not in varying:
                continue
            if told is None or place in told or fact.owner is None:
                differing.add((place, fact.text))
                continue
            attributes[id(fact.owner), fact.name] = place
            if not isinstance(fact.value, _CONSTANTS):
                values[id(fact.value)] = place
        absent = {(place, "") for place in texts if place not in facts}
        kinds.append(numbers.setdefault(frozenset(differing | absent), len(numbers)))
    return tuple(kinds), Unread(attributes, values)


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
    label = f"{place[:-1] or 'themselves'} being" if place.endswith(":") else place
    if one is None or other is None:
        return [f"{label} {fact.words}, which only one of them has"[:160] for fact in (one, other) if fact is not None]
    if place.endswith(":") and one.words == other.words:
        return [f"{label} {one.words}, each of a class of its own"]
    return [f"{label} {fact.words}"[:120] for fact in (one, other)]


def _use(facts: Facts, places: Sequence[str], layer: int, name_of: Callable[[int, str], str]) -> str:
    """How the layers use the attributes in which they differ."""
    attributes = [place for place in places if place in facts and facts[place].owner is not None]
    if any(place.rpartition(".")[2] in NAMING for place in attributes):
        return ", which their code computes with"
    if any(repr(name_of(layer, place.rpartition(".")[0])) in facts[place].words for place in attributes):
        return ": the layers read their own name"
    return ", which their forward reads" if attributes else ""


def _differing(one: Facts, other: Facts, ignored: Collection[str]) -> list[str]:
    """Places that differ: first those that both have."""
    both = [place for place in one if place in other and one[place].text != other[place].text and place not in ignored]
    return both + [place for place in {**one, **other} if (place in one) != (place in other)]
