"""The layer stack of a model, and the kind of each of its layers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from glowplug.layers.naming import NAMING, computed_with, mentions
from glowplug.layers.registry import MARKS
from glowplug.layers.shards import forward_text, sharding_text
from glowplug.layers.watch import without_inert

_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device})
_TABLES = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})


@dataclass(frozen=True)
class LayerStack:
    """The layers of a model that run one after another.

    Attributes:
        path: qualified name of the `nn.ModuleList` or `nn.Sequential`; empty when it is the model itself.
        layers: the layers, in order.
        kinds: the kind of each, as a number; equal numbers mean the same function of (inputs, own weights, own handle).
        named_by: attributes that hold a module's own qualified name. Kinds leave that name out, so a trace that reads
            one of them must not be stamped.
    """

    path: str
    layers: tuple[nn.Module, ...]
    kinds: tuple[int, ...]
    named_by: frozenset[str] = frozenset()

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


def find_stack(model: nn.Module, inside: Sequence[nn.Module], config: Any = None) -> LayerStack | None:
    """The stack that holds most of the modules `inside` (a model's attention layers), with the kinds of its layers.

    Args:
        model: the model.
        inside: modules of which each layer of the stack holds one; or, when there is no such stack, all of which one
            stack holds, some of its layers having none (experts that are layers of their own).
        config: its lists of one entry a layer are part of each layer's kind, as a loop over layers may read them.
    """
    wanted = {id(module) for module in inside}
    best: tuple[bool, int, str, nn.ModuleList] | None = None
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            held = [sum(id(child) in wanted for child in layer.modules()) for layer in module]
            each, holding = all(held), sum(map(bool, held))
            fits = each or (holding > 1 and sum(held) == len(wanted))
            if fits and (best is None or (each, holding) > best[:2]):
                best = each, holding, path, module
    if best is None:
        return None
    return _describe_stack(best[2], best[3], config)


def find_repetition(model: nn.Module) -> LayerStack | None:
    """The stack of a model that nothing is known of: the one of whose modules most need not be traced, as a prefix
    shows what they do. None when there is none."""
    best: tuple[int, LayerStack] | None = None
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or choose_template(_classes(module)) is None:
            continue
        if list(module._modules) != [str(index) for index in range(len(module))]:
            continue
        stack = _describe_stack(path, module, None)
        length = choose_template(stack.kinds)
        saved = sum(len(list(layer.modules())) for layer in stack.layers[length:]) if length is not None else 0
        if saved > (best[0] if best is not None else 0):
            best = saved, stack
    return best[1] if best is not None else None


def _classes(stack: Iterable[nn.Module]) -> list[int]:
    numbers: dict[type, int] = {}
    return [numbers.setdefault(type(layer), len(numbers)) for layer in stack]


def _describe_stack(path: str, stack: Iterable[nn.Module], config: Any) -> LayerStack:
    layers = tuple(stack)
    uses = _Uses(path)
    return LayerStack(path, layers, _kinds(layers, config, uses), frozenset(uses.named_by))


def kinds_of(layers: Sequence[nn.Module]) -> tuple[int, ...]:
    """The kind of each module, as a number: equal numbers mean the same function of (inputs, own weights)."""
    numbers: dict[str, int] = {}
    return tuple(numbers.setdefault(text, len(numbers)) for text in describe_layers(layers))


def describe_layers(layers: Sequence[nn.Module]) -> list[str]:
    """Of each module everything that its forward can read but for the weights' values, hashed: equal texts mean the
    same function of (inputs, own weights). They hold in this process, while what they describe lives."""
    uses = _Uses()
    return [hashlib.sha256("\n".join(_signature(layer, 0, uses)).encode()).hexdigest() for layer in layers]


def _kinds(layers: Sequence[nn.Module], config: Any, uses: _Uses) -> tuple[int, ...]:
    table: list[list[Any]] = []
    counting = list(range(len(layers)))  # a list of the layers of some sort, when that is all of them
    for value in vars(config).values() if config is not None else ():
        if isinstance(value, (list, tuple)) and len(value) == len(layers) and list(value) != counting:
            table.append(list(value))
    numbers: dict[str, int] = {}
    kinds = []
    for index, layer in enumerate(layers):
        entries = [_describe(column[index]) for column in table]
        text = "\n".join([*entries, *_signature(layer, index, uses)])
        digest = hashlib.sha256(text.encode()).hexdigest()
        kinds.append(numbers.setdefault(digest, len(numbers)))
    return tuple(kinds)


class _Uses:
    """What is known of the layers' classes and objects, asked once.

    Args:
        path: qualified name of the stack, where the layers' own names are known.

    Attributes:
        named_by: see `LayerStack`.
        contents: id of an object of plain values, such as a config -> its text, written once.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.named_by: set[str] = set()
        self.contents: dict[int, str] = {}
        self._computed: dict[tuple[Any, ...], frozenset[str]] = {}

    def names_only(self, module: nn.Module) -> frozenset[str]:
        """The attributes of a module that merely name the layer."""
        if not mentions(type(module)):  # type: ignore[arg-type]
            return NAMING
        key = tuple((path, type(part), "forward" in part.__dict__) for path, part in module.named_modules())
        if key not in self._computed:
            self._computed[key] = computed_with(module)
        return NAMING - self._computed[key]


def _signature(layer: nn.Module, index: int, uses: _Uses) -> list[str]:
    """Everything that the layer's forward can read, but for what merely names the layer and the weights' values."""
    lines = []
    whole = f"{uses.path}.{index}".lstrip(".") if uses.path is not None else None
    for path, module in layer.named_modules(remove_duplicate=False):
        cls = type(module)
        lines.append(
            f"{path}: {cls.__module__}.{cls.__qualname__} {id(cls)} {_code(module)} training={module.training}"
        )
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            lines.append(f"{path}.{name} {_tensor(tensor)}")
        names_only = uses.names_only(module)
        for name, value in sorted(module.__dict__.items()):
            if name in MARKS or name in names_only or name in _TABLES or name in ("training", "forward"):
                continue
            if name.endswith("_hooks") and isinstance(value, dict):
                value = list(without_inert(value).values()) if value else None
                if not value:
                    continue
            described = _describe(value, uses.contents)
            if whole is not None and repr(own := f"{whole}.{path}".rstrip(".")) in described:
                uses.named_by.add(name)
                described = described.replace(repr(own), "its own name")
            lines.append(f"{path}.{name} {described}")
    return lines


def why_distinct(stack: LayerStack) -> str:
    """What keeps the stack's layers apart, shown on the two of different kinds, of the first few, that differ least."""
    uses = _Uses(stack.path)
    few = [dict(_keyed(_signature(layer, index, uses))) for index, layer in enumerate(stack.layers[:_FEW])]
    pairs = [(a, b) for b in range(len(few)) for a in range(b) if stack.kinds[a] != stack.kinds[b]]
    differing = {(a, b): _differences(few[a], few[b]) for a, b in pairs}
    if not differing:
        return "most layers are of a kind of their own"
    one, other = min(differing, key=lambda pair: len(differing[pair]) or _MANY)
    shown = "; ".join(differing[one, other][:2]) or "the config's entries for them"
    used = ", which their code computes with" if NAMING & set(re.findall(r"\w+", shown)) else ""
    return f"most layers are of a kind of their own: layers {one} and {other} differ in {shown}{used}"


_CLASS = re.compile(r"^(.*): (?:\w+\.)*(\w+) \d+ .*$")
_FEW = 8
_MANY = 10**6


def _keyed(lines: Iterable[str]) -> Iterable[tuple[str, str]]:
    return ((line.partition(" ")[0], line.strip()) for line in lines)


def _differences(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Lines that differ: first those that both have, one below the other; then those that only one has."""
    changed = [line for key in one if key in other and one[key] != other[key] for line in (one[key], other[key])]
    added = [line for key, line in {**one, **other}.items() if (key in one) != (key in other) and "hooks" not in key]
    return [_CLASS.sub(r"\1 being a \2", line)[:120] for line in changed + added]


def why_no_template(kinds: Sequence[int]) -> str:
    """Why no prefix of a stack shows how to run all of it: which of its layers the prefixes lack."""
    depth, seen, last = len(kinds), set(), 0
    for start in range(depth - 2):
        triple = tuple(kinds[start : start + 3])
        if triple not in seen:
            last = start
        seen.add(triple)
    if last + 3 >= depth - 1:
        return (
            f"no part of the {depth} layers shows how all of them follow each other: layers {last} to {last + 2} do so "
            "as no layers before them"
        )
    return f"no part of the {depth} layers shows often enough how all of them follow each other"


def _code(module: nn.Module) -> str:
    forward = module.__dict__.get("forward")
    return f"own forward {forward_text(module, _describe)}" if forward is not None else ""


def _tensor(tensor: torch.Tensor | None) -> str:
    if tensor is None:
        return "none"
    return (
        f"{tuple(tensor.shape)} {tensor.dtype} {tensor.stride()} {tensor.device} {tensor.requires_grad} {type(tensor)}"
        f"{sharding_text(tensor)}"
    )


def _describe(value: Any, contents: dict[int, str] | None = None) -> str:
    """A value as text: plain values by content, containers and dataclasses of them likewise, anything else by identity.

    Args:
        value: the value.
        contents: id of a dataclass's object -> its text, where it was described before.
    """
    known = contents if contents is not None else {}

    def describe(item: Any) -> str:
        return _describe(item, known)

    if type(value) in _PLAIN:
        return repr(value)
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(describe, value))})"
    if isinstance(value, dict):
        return f"dict({', '.join(f'{describe(k)}: {describe(v)}' for k, v in value.items())})"
    if isinstance(value, (set, frozenset)):
        return f"set({', '.join(sorted(map(describe, value)))})"
    if isinstance(value, torch.Tensor):
        return f"tensor {_tensor(value)}"
    if isinstance(value, nn.Module):
        return f"module {type(value).__qualname__}"
    if isinstance(value, functools.partial):
        return f"partial({', '.join(map(describe, (value.func, value.args, value.keywords)))})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__"):
        return _content(value, known)
    shared = getattr(value, "__qualname__", None)
    return f"{type(value).__qualname__} {shared or id(value)}"


def _content(value: Any, known: dict[int, str]) -> str:
    """An object of a dataclass, such as a config that a layer has of its own: what it holds, hashed."""
    if id(value) not in known:
        name = f"{type(value).__qualname__} {id(type(value))}"
        known[id(value)] = f"{name} {id(value)}"  # for what refers to itself
        items = sorted((key, _describe(item, known)) for key, item in vars(value).items())
        known[id(value)] = f"{name} {hashlib.sha256(repr(items).encode()).hexdigest()[:16]}"
    return known[id(value)]


def choose_template(kinds: Sequence[int]) -> int | None:
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


def _runs(kinds: Sequence[int], size: int) -> set[tuple[int, ...]]:
    return {tuple(kinds[start : start + size]) for start in range(len(kinds) - size + 1)}


def _repeated(kinds: Sequence[int]) -> set[tuple[int, int]]:
    """Transitions that occur at least twice behind the first, whose step also depends on what comes before it."""
    pairs = list(pairwise(kinds[1:]))
    return {pair for pair in pairs if pairs.count(pair) > 1}
