"""The layer stack of a model, and the kind of each of its layers."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from glowplug.layers.naming import NAMING, computed_with
from glowplug.layers.registry import MARKS
from glowplug.layers.shards import forward_text, sharding_text
from glowplug.layers.watch import without_inert

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
        inside: modules of which each layer of the stack holds one.
        config: its lists of one entry a layer are part of each layer's kind, as a loop over layers may read them.
    """
    wanted = {id(module) for module in inside}
    best: tuple[int, str, nn.ModuleList] | None = None
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            held = sum(any(id(child) in wanted for child in layer.modules()) for layer in module)
            if held == len(module) and (best is None or held > best[0]):
                best = held, path, module
    if best is None:
        return None
    return _describe_stack(best[1], best[2], config)


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
    return _kinds(layers, None, _Uses())


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


class _Uses(dict[type, frozenset[str]]):
    """class -> what `computed_with` says of it, asked once.

    Args:
        path: qualified name of the stack, where the layers' own names are known.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.path = path
        self.named_by: set[str] = set()

    def __missing__(self, cls: type) -> frozenset[str]:
        self[cls] = computed_with(cls)
        return self[cls]


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
        names_only = NAMING - uses[cls]
        for name, value in sorted(module.__dict__.items()):
            if name in MARKS or name in names_only or name in _TABLES or name in ("training", "forward"):
                continue
            if name.endswith("_hooks") and isinstance(value, dict):
                value = list(without_inert(value).values())
            described = _describe(value)
            if whole is not None and repr(own := f"{whole}.{path}".rstrip(".")) in described:
                uses.named_by.add(name)
                described = described.replace(repr(own), "its own name")
            lines.append(f"{path}.{name} {described}")
    return lines


def why_distinct(stack: LayerStack) -> str:
    """What keeps the stack's layers apart, shown on two neighbours of different kinds."""
    uses = _Uses(stack.path)
    for index, (one, other) in enumerate(pairwise(stack.layers)):
        if stack.kinds[index] != stack.kinds[index + 1]:
            lines = set(_signature(one, index, uses)) ^ set(_signature(other, index + 1, uses))
            shown = "; ".join(sorted(line.strip()[:120] for line in lines)[:2]) or "the config's entries for them"
            return f"most layers are of a kind of their own: layers {index} and {index + 1} differ in {shown}"
    return "most layers are of a kind of their own"


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


def _describe(value: Any) -> str:
    """A value as text: plain values by content, containers of them likewise, anything else by identity."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(_describe, value))})"
    if isinstance(value, dict):
        return f"dict({', '.join(f'{_describe(k)}: {_describe(v)}' for k, v in value.items())})"
    if isinstance(value, (set, frozenset)):
        return f"set({', '.join(sorted(map(_describe, value)))})"
    if isinstance(value, torch.Tensor):
        return f"tensor {_tensor(value)}"
    if isinstance(value, nn.Module):
        return f"module {type(value).__qualname__}"
    if isinstance(value, functools.partial):
        return f"partial({', '.join(map(_describe, (value.func, value.args, value.keywords)))})"
    shared = getattr(value, "__qualname__", None)
    return f"{type(value).__qualname__} {shared or id(value)}"


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
