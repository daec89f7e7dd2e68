"""A model's layer stack: where it is, the kinds of its layers, and the template that shows how to run it."""

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
"""The number of kinds that are compared to explain what keeps them apart."""


@dataclass(frozen=True)
class LayerStack:
    """The layers of a model that run one after another.

    Attributes:
        path: qualified name of the `nn.ModuleList` or `nn.Sequential`; empty if it is the model itself.
        layers: the layers, in order.
        kinds: the kind of each, as a number; equal numbers mean the same function of (inputs, own weights, own handle).
        unread: the attributes that the kinds ignore; a trace that reads one of them must not be stamped.
        facts: what the kinds were decided from.
    """

    path: str
    layers: tuple[nn.Module, ...]
    kinds: tuple[int, ...]
    unread: Unread = field(default_factory=Unread)
    facts: LayerFacts | None = field(default=None, repr=False, compare=False)

    def index_of(self, name: str) -> tuple[int, str] | None:
        """The index of the layer that a qualified name lies in, and the rest of the name. None outside the stack."""
        head = f"{self.path}." if self.path else ""
        if not name.startswith(head):
            return None
        index, _, rest = name[len(head) :].partition(".")
        return (int(index), rest) if index.isdigit() else None

    def name_of(self, layer: int, rest: str = "") -> str:
        """The qualified name of a layer, or of a path in it."""
        return ".".join(filter(None, (self.path, str(layer), rest)))


def find_stack(
    model: nn.Module, mixers: Sequence[nn.Module], config: Any = None, read: Collection[str] | None = None
) -> LayerStack | None:
    """Find the stack that holds most of a model's token mixers, with the kinds of its layers.

    Prefers a stack in which every layer holds a mixer. Otherwise one stack must hold all of the mixers, and some of its
    layers may have none (experts that are layers of their own).

    Args:
        model: the model.
        mixers: the token mixers, such as attention layers.
        config: a configuration whose lists with one entry per layer count for the kinds, because a loop over the layers
            may read them.
        read: see `glowplug.layers.kinds.tell_apart`.
    """
    wanted = {id(module) for module in mixers}
    candidates: list[tuple[bool, int, str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            counts = [sum(id(child) in wanted for child in layer.modules()) for layer in module]
            each, holding = all(counts), sum(map(bool, counts))
            if each or (holding > 1 and sum(counts) == len(wanted)):
                candidates.append((each, holding, path, module))
    if not candidates:
        return None
    _, _, path, stack = max(candidates, key=lambda candidate: candidate[:2])
    return _describe_stack(model, path, stack, config, read, caches=True)


def find_repetition(
    model: nn.Module, read: Collection[str] = (), *, binds: bool = False, shared: tuple[type, ...] = ()
) -> LayerStack | None:
    """Find the stack of an arbitrary model: the one for which a template saves tracing the most modules.

    If no stack has a template, returns the largest one whose layers repeat their classes, or None.

    Args:
        model: the model.
        read: see `glowplug.layers.kinds.tell_apart`.
        binds: whether the front end binds the names of layers, and tensors wherever they are.
        shared: classes of objects that all layers share.
    """
    candidates: list[tuple[int, int, LayerStack]] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        classes = [f"{type(layer).__module__}.{type(layer).__qualname__}" for layer in module]
        if choose_template(classes) is None or list(module._modules) != list(map(str, range(len(module)))):
            continue
        stack = _describe_stack(model, path, module, None, read, caches=False, binds=binds, shared=shared)
        length = choose_template(stack.kinds)
        sizes = [len(list(layer.modules())) for layer in stack.layers]
        candidates.append((sum(sizes[length:]) if length is not None else 0, sum(sizes), stack))
    return max(candidates, key=lambda candidate: candidate[:2])[2] if candidates else None


def _describe_stack(
    model: nn.Module,
    path: str,
    stack: Iterable[nn.Module],
    config: Any,
    read: Collection[str] | None,
    *,
    caches: bool,
    binds: bool = False,
    shared: tuple[type, ...] = (),
) -> LayerStack:
    layers = tuple(stack)
    columns = dict(_columns("the config's ", config, len(layers))) if config is not None else {}
    columns |= _looked_up(model, path, len(layers), config)
    modules = {id(module) for module in model.modules()}
    named = path if binds else None
    facts = LayerFacts(layers, columns, modules, strict=read is None, caches=caches, stack=named, shared=shared)
    kinds, unread = tell_apart([facts.of(index) for index in range(len(layers))], read)
    return LayerStack(path, layers, kinds, unread, facts)


def describe_layers(layers: Sequence[nn.Module]) -> list[str]:
    """Hash, for each module, everything that its forward can read except weights' values. Equal texts mean the same
    function of (inputs, own weights). They hold in this process, while the modules live."""
    facts = LayerFacts(layers, strict=True)
    texts = [repr(sorted((place, fact.text) for place, fact in facts.of(n).items())) for n in range(len(layers))]
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def _looked_up(model: nn.Module, path: str, depth: int, config: Any) -> dict[str, list[Fact]]:
    """Lists with one entry per layer in the modules around a stack, or in objects that these hold. A loop over the
    layers may look them up."""
    columns: dict[str, list[Fact]] = {}
    at: nn.Module = model
    names = path.split(".") if path else []
    for number, name in enumerate(["", *names[:-1]]):
        at = at._modules[name] if name else at  # type: ignore[assignment]
        prefix = "".join(f"{part}." for part in names[:number])
        columns |= _columns(prefix, at, depth)
        for attribute, value in vars(at).items():
            is_object = isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, _NO_OBJECTS)
            if is_object and value is not config and attribute != "forward":
                columns |= _columns(f"{prefix}{attribute}.", value, depth)
    return columns


_NO_OBJECTS = (nn.Module, type, types.FunctionType, types.ModuleType)


def _columns(prefix: str, owner: Any, depth: int) -> Iterator[tuple[str, list[Fact]]]:
    for name, value in vars(owner).items():
        if isinstance(value, (list, tuple)) and len(value) == depth and list(value) != list(range(depth)):
            yield f"{prefix}{name}", [Fact("", entry, owner, name) for entry in value]


def why_distinct(stack: LayerStack) -> str:
    """Say that most of a stack's layers are of a kind of their own, and what keeps them apart."""
    return f"most layers are of a kind of their own{_difference(stack, ': ')}"


def why_not_repeated(stack: LayerStack) -> str:
    """Say why a stack has no template, and what keeps its layers apart."""
    return f"{why_no_template(stack.kinds)}{_difference(stack, '; ')}"


def _difference(stack: LayerStack, before: str) -> str:
    """Say how the two most similar of the first few kinds differ."""
    assert stack.facts is not None
    first = [stack.kinds.index(kind) for kind in range(len(set(stack.kinds)))][:_FEW]
    text = difference({index: stack.facts.of(index) for index in first}, stack.unread, stack.name_of)
    return f"{before}{text}" if text else ""


def why_no_template(kinds: Sequence[int]) -> str:
    """Say why a stack has no template: which layers its prefixes lack."""
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
    """The length of the template: the shortest prefix of a stack that shows how to run all of it.

    The template contains every run of three neighbouring kinds of the stack, ends in the stack's last two kinds, and
    repeats each transition that the stack repeats, so that equal pieces are observed and not assumed.

    Returns:
        The length; None if only the whole stack will do.

    Example:
        >>> choose_template([0, 0, 0] + [1] * 89)  # three dense layers, then experts
        6
    """
    depth = len(kinds)
    triples = _runs(kinds, 3)
    repeated = _repeated(kinds)
    for length in range(2, depth):
        prefix = kinds[:length]
        same_end = list(prefix[-2:]) == list(kinds[-2:])
        if same_end and _runs(prefix, 3) == triples and repeated <= _repeated(prefix):
            return length
    return None


def choose_preview(kinds: Sequence[Hashable]) -> tuple[int, ...] | None:
    """The layers of a template that a trace needs to find most of its distinct pieces: the first of each kind, and the
    last layer. None if they are not fewer by two.

    Example:
        >>> choose_preview([0, 0, 0, 1, 1, 1])
        (0, 3, 5)
    """
    first = {kind: kinds.index(kind) for kind in dict.fromkeys(kinds)}
    layers = tuple(sorted({*first.values(), len(kinds) - 1}))
    return layers if len(layers) + 2 <= len(kinds) else None


def _runs(kinds: Sequence[Hashable], size: int) -> set[tuple[Hashable, ...]]:
    return {tuple(kinds[start : start + size]) for start in range(len(kinds) - size + 1)}


def _repeated(kinds: Sequence[Hashable]) -> set[tuple[Hashable, Hashable]]:
    """Transitions that occur at least twice. The first one is left out: its step also depends on the stack's input."""
    pairs = list(pairwise(kinds[1:]))
    return {pair for pair in pairs if pairs.count(pair) > 1}
