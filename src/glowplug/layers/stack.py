"""The layer stack of a model: where it lies, the kinds of its layers, and the template that shows how to run it."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import nn

from glowplug.layers.kinds import Fact, LayerFacts, Unread, difference, tell_apart

_FEW = 8
"""Kinds that are looked at to say what keeps them apart."""


@dataclass(frozen=True)
class LayerStack:
    """The layers of a model that run one after another.

    Attributes:
        path: qualified name of the `nn.ModuleList` or `nn.Sequential`; empty when it is the model itself.
        layers: the layers, in order.
        kinds: the kind of each, as a number; equal numbers mean the same function of (inputs, own weights, own handle).
        unread: what the kinds leave out: a trace that reads any of it must not be stamped.
        facts: what the kinds were told by.
    """

    path: str
    layers: tuple[nn.Module, ...]
    kinds: tuple[int, ...]
    unread: Unread = field(default_factory=Unread)
    facts: LayerFacts | None = field(default=None, repr=False, compare=False)

    def index_of(self, name: str) -> tuple[int, str] | None:
        """The layer that a qualified name lies in, and the rest of the name; None when it lies outside the stack."""
        head = f"{self.path}." if self.path else ""
        if not name.startswith(head):
            return None
        index, _, rest = name[len(head) :].partition(".")
        return (int(index), rest) if index.isdigit() else None

    def name_of(self, layer: int, rest: str = "") -> str:
        """The qualified name of a layer, or of what lies at a path in it."""
        return ".".join(filter(None, (self.path, str(layer), rest)))


def find_stack(
    model: nn.Module, inside: Sequence[nn.Module], config: Any = None, told: Collection[str] | None = None
) -> LayerStack | None:
    """The stack that holds most of the modules `inside` (a model's attention layers), with the kinds of its layers.

    Args:
        model: the model.
        inside: modules of which each layer of the stack holds one; or, when there is no such stack, all of which one
            stack holds, some of its layers having none (experts that are layers of their own).
        config: its lists of one entry a layer are part of each layer's kind, as a loop over layers may read them.
        told: see `glowplug.layers.kinds.tell_apart`.
    """
    wanted = {id(module) for module in inside}
    found: list[tuple[bool, int, str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            held = [sum(id(child) in wanted for child in layer.modules()) for layer in module]
            each, holding = all(held), sum(map(bool, held))
            if each or (holding > 1 and sum(held) == len(wanted)):
                found.append((each, holding, path, module))
    if not found:
        return None
    _, _, path, stack = max(found, key=lambda candidate: candidate[:2])
    return _describe_stack(model, path, stack, config, told, caches=True)


def find_repetition(model: nn.Module, told: Collection[str] = ()) -> LayerStack | None:
    """The stack of a model that nothing is known of: the one of whose modules most need not be traced, as a prefix
    shows what they do. If there is none, the largest whose layers repeat their classes without showing that; None when
    there is none, either.

    Args:
        model: the model.
        told: see `glowplug.layers.kinds.tell_apart`.
    """
    found: list[tuple[int, int, LayerStack]] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        classes = [f"{type(layer).__module__}.{type(layer).__qualname__}" for layer in module]
        if choose_template(classes) is None or list(module._modules) != list(map(str, range(len(module)))):
            continue
        stack = _describe_stack(model, path, module, None, told, caches=False)
        length = choose_template(stack.kinds)
        sizes = [len(list(layer.modules())) for layer in stack.layers]
        found.append((sum(sizes[length:]) if length is not None else 0, sum(sizes), stack))
    return max(found, key=lambda candidate: candidate[:2])[2] if found else None


def _describe_stack(
    model: nn.Module, path: str, stack: Iterable[nn.Module], config: Any, told: Collection[str] | None, *, caches: bool
) -> LayerStack:
    layers = tuple(stack)
    columns = dict(_columns("the config's ", config, len(layers))) if config is not None else {}
    columns |= _looked_up(model, path, len(layers), config)
    modules = {id(module) for module in model.modules()}
    facts = LayerFacts(layers, columns, modules, strict=told is None, caches=caches)
    kinds, unread = tell_apart([facts.of(index) for index in range(len(layers))], told)
    return LayerStack(path, layers, kinds, unread, facts)


def describe_layers(layers: Sequence[nn.Module]) -> list[str]:
    """Of each module everything that its forward can read but for the weights' values, hashed: equal texts mean the
    same function of (inputs, own weights). They hold in this process, while what they describe lives."""
    facts = LayerFacts(layers, strict=True)
    texts = [repr(sorted((place, fact.text) for place, fact in facts.of(n).items())) for n in range(len(layers))]
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def _looked_up(model: nn.Module, path: str, depth: int, config: Any) -> dict[str, list[Fact]]:
    """What the modules around a stack hold of one entry a layer, themselves or in an object: a loop over the layers may
    look it up."""
    columns: dict[str, list[Fact]] = {}
    at: nn.Module = model
    names = path.split(".") if path else []
    for number, name in enumerate(["", *names[:-1]]):
        at = at._modules[name] if name else at  # type: ignore[assignment]
        prefix = "".join(f"{part}." for part in names[:number])
        columns |= _columns(prefix, at, depth)
        for attribute, value in vars(at).items():
            held = isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, _NO_HOLDERS)
            if held and value is not config and attribute != "forward":
                columns |= _columns(f"{prefix}{attribute}.", value, depth)
    return columns


_NO_HOLDERS = (nn.Module, type, types.FunctionType, types.ModuleType)


def _columns(prefix: str, holder: Any, depth: int) -> Iterator[tuple[str, list[Fact]]]:
    for name, value in vars(holder).items():
        if isinstance(value, (list, tuple)) and len(value) == depth and list(value) != list(range(depth)):
            yield f"{prefix}{name}", [Fact("", entry, holder, name) for entry in value]


def why_distinct(stack: LayerStack) -> str:
    """That most of a stack's layers are of a kind of their own, and what keeps them apart."""
    return f"most layers are of a kind of their own{_difference(stack, ': ')}"


def why_not_repeated(stack: LayerStack) -> str:
    """Why no prefix of a stack shows how to run all of it, and what keeps its layers apart."""
    return f"{why_no_template(stack.kinds)}{_difference(stack, '; ')}"


def _difference(stack: LayerStack, before: str) -> str:
    """What keeps the first layers of the first few kinds apart, shown on the two that differ least."""
    assert stack.facts is not None
    first = [stack.kinds.index(kind) for kind in range(len(set(stack.kinds)))][:_FEW]
    found = difference({index: stack.facts.of(index) for index in first}, stack.unread, stack.name_of)
    return f"{before}{found}" if found else ""


def why_no_template(kinds: Sequence[int]) -> str:
    """Why no prefix of a stack shows how to run all of it: which of its layers the prefixes lack."""
    depth = len(kinds)
    triples = [tuple(kinds[start : start + 3]) for start in range(depth - 2)]
    last = max((triples.index(triple) for triple in triples), default=0)
    if last + 3 >= depth - 1:
        return (
            f"no part of the {depth} layers shows how all of them follow each other: layers {last} to {last + 2} do so "
            "as no layers before them"
        )
    return f"no part of the {depth} layers shows often enough how all of them follow each other"


def choose_template(kinds: Sequence[Hashable]) -> int | None:
    """The length of the shortest prefix of a stack that shows how to run all of it.

    It shows every run of three neighbouring kinds that the stack has; it ends in the stack's last two kinds; and each
    transition that the stack repeats, it repeats, so that equal pieces are seen and not assumed.

    Returns:
        The length; None when only the whole stack shows it all.

    Example:
        >>> choose_template([0, 0, 0] + [1] * 89)  # three dense layers, then experts
        6
    """
    depth = len(kinds)
    triples = _runs(kinds, 3)
    repeated = _repeated(kinds)
    for length in range(2, depth):
        prefix = kinds[:length]
        if list(prefix[-2:]) != list(kinds[-2:]) or _runs(prefix, 3) != triples:
            continue
        if repeated <= _repeated(prefix):
            return length
    return None


def _runs(kinds: Sequence[Hashable], size: int) -> set[tuple[Hashable, ...]]:
    return {tuple(kinds[start : start + size]) for start in range(len(kinds) - size + 1)}


def _repeated(kinds: Sequence[Hashable]) -> set[tuple[Hashable, Hashable]]:
    """Transitions that occur at least twice behind the first, whose step also depends on what comes before it."""
    pairs = list(pairwise(kinds[1:]))
    return {pair for pair in pairs if pairs.count(pair) > 1}
