"""The layers of a decoder: its template, and where the inputs of the template's graph lie in the decoder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from glowplug.errors import NotStampableError
from glowplug.frontends.vllm.private import vllm
from glowplug.graph.capture import Captured, GraphInput
from glowplug.graph.sources import Source, at, in_layer, named
from glowplug.graph.split import Piece, Step
from glowplug.graph.stamp import Locations, Own
from glowplug.layers.describe import inner_text
from glowplug.layers.stack import LayerStack, find_repetition
from glowplug.program import template as templates
from glowplug.program.template import Template
from glowplug.reasons import counted

_FIRST, _END = "start_layer", "end_layer"


def choose(decoder: nn.Module, read: Collection[str]) -> Template | str:
    """The template of a decoder; or why it has none, in one sentence.

    Args:
        decoder: the decoder.
        read: places of attributes that traces have read, see `glowplug.layers.kinds.tell_apart`.

    Raises:
        NotStampableError: its layers differ too much.
    """
    stack = find_repetition(decoder, read, binds=True, shared=vllm().shared)
    if stack is None:
        return "it has no layers that repeat"
    first, end = (getattr(decoder, name, default) for name, default in ((_FIRST, 0), (_END, len(stack.layers))))
    if (first, end) != (0, len(stack.layers)):
        return f"it runs layers {first} to {end} of {len(stack.layers)}"
    template = templates.choose(stack)
    return template if template is not None else f"it has only {counted(len(stack.layers), 'layer')}"


def short_decoder(decoder: nn.Module, template: Template) -> nn.Module:
    """A copy of a decoder with only the template's layers, which shares its modules and weights."""
    short = templates.short_model(decoder, template)
    if hasattr(decoder, _END):
        short.__dict__[_END] = template.length
    return short


# -- names -------------------------------------------------------------------------------------------------------


class Names:
    """Where in its layer each name is kept by which an op finds its layer, such as `self_attn.attn.layer_name`."""

    def __init__(self, stack: LayerStack) -> None:
        self._stack = stack
        self._kept = [dict(_texts(layer)) for layer in stack.layers]

    def locate(self, name: str) -> tuple[int, str] | None:
        """(index of the layer, rest of the source) for a name; None for a name of no layer of the stack.

        Raises:
            NotStampableError: it is not known where the other layers keep theirs.
        """
        parts = name.split(".")
        tail = self._stack.path.split(".")[-1:] if self._stack.path else []
        for number, part in enumerate(parts):
            if part.isdigit() and parts[number - 1 : number] == tail and int(part) < len(self._kept):
                return int(part), self._rest(int(part), name)
        return None

    def _rest(self, layer: int, name: str) -> str:
        places = [place for place, text in self._kept[layer].items() if text == name]
        if not places:
            raise NotStampableError(f"nothing in layer {layer} has the name {name!r}", (layer,))
        for other, kept in enumerate(self._kept):
            texts = {kept[place] for place in places if place in kept}
            if len(texts) > 1:
                raise NotStampableError(
                    f"layer {other} has several names where layer {layer} has {name!r}: {', '.join(sorted(texts))}",
                    (layer, other),
                )
        return places[0]


def _texts(layer: nn.Module) -> Iterator[tuple[str, str]]:
    """Rest of the source -> text, for every text that the modules of a layer have as an attribute."""
    for path, module in layer.named_modules():
        head = "".join(f"._modules[{part!r}]" for part in path.split(".") if part)
        for name, value in vars(module).items():
            if type(value) is str:
                yield f"{head}.{name}", value


# -- places ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceBinder:
    """Finds what a stamped program needs in the layers of a decoder, by the rest of a source in the layer.

    Attributes:
        stack: qualified name of the stack.
        layers: its layers.
        names: the rests of sources that are names of layers.
        encode: makes the value that ops receive from a name.
    """

    stack: str
    layers: Sequence[nn.Module]
    names: frozenset[str]
    encode: Callable[[str], Any]

    def of(self, decoder: nn.Module) -> SourceBinder:
        """The same for the layers that the decoder has now."""
        layers: Any = decoder.get_submodule(self.stack)
        return replace(self, layers=tuple(layers))

    def find(self, layer: int, own: Own) -> Any:
        """See `Binds.find`; NotStampableError if the layer has nothing there."""
        try:
            value = at(self.layers[layer + own.offset], own.path)
        except LookupError as exc:
            raise NotStampableError(f"layer {layer + own.offset} has no {own.path}", (layer + own.offset,)) from exc
        return self.encode(value) if own.path in self.names else value

    def name_of(self, layer: int, own: Own) -> str:
        """See `Binds.name_of`."""
        return f"{self.stack}.{layer + own.offset}{own.path}"


def locate(
    stack: LayerStack, captured: Captured, arguments: Mapping[str, str]
) -> tuple[Captured, Locations, frozenset[str]]:
    """Find the inputs of a template's graph in the layers.

    Returns:
        The graph, in which a tensor that only some layers share has an input for each layer; the places of its inputs;
        and the rests of sources that are names.

    Raises:
        NotStampableError: an input can't be found in all layers that read it.
    """
    captured = _unshared(captured, stack)
    names, own, rests = Names(stack), {}, set()
    for entry in captured.inputs:
        if entry.node in arguments or entry.type == "symint":
            continue
        if entry.type == "handle":
            place = names.locate(entry.value.value)
            rests |= {place[1]} if place is not None else set()
        else:
            place = in_layer(entry.source, stack.path)
            if place is not None and _shared_by_all(stack, place[1]):
                place = None
        if place is not None:
            own[entry.node] = place
    outside = frozenset(entry.node for entry in captured.inputs if entry.node not in own)
    return captured, Locations(own, outside), frozenset(rests)


def _of_layers(stack: LayerStack, rest: str) -> dict[int, Any]:
    """Layer -> what it has at the rest of a source."""
    values = {}
    for index, layer in enumerate(stack.layers):
        with contextlib.suppress(LookupError):
            values[index] = at(layer, rest)
    return values


def _shared_by_all(stack: LayerStack, rest: str) -> bool:
    values = list(_of_layers(stack, rest).values())
    return len(values) > 1 and all(value is values[0] for value in values)


def _unshared(captured: Captured, stack: LayerStack) -> Captured:
    """Give each layer an input of its own for a tensor that some layers share, as the layers beyond the template may
    share another one. Dynamo gives them one input, whose source is that of its first reader."""
    inputs: list[GraphInput] = []
    nodes = {node.name: node for node in captured.gm.graph.nodes if node.op == "placeholder"}
    for entry in captured.inputs:
        inputs.append(entry)
        place = in_layer(entry.source, stack.path) if entry.type == "tensor" else None
        if place is None or _shared_by_all(stack, place[1]):
            continue
        values = _of_layers(stack, place[1])
        sharing = {layer for layer, value in values.items() if value is entry.value and layer != place[0]}
        if not sharing:
            continue
        for node in list(nodes[entry.node].users):
            layer = templates.traced_in(stack, node)
            if layer is None or layer == place[0]:
                continue
            if layer not in sharing:
                raise NotStampableError(f"layer {layer} reads {named(entry.source)}", (place[0], layer))
            name = f"{entry.node}_of_{layer}"
            if name not in nodes:
                with captured.gm.graph.inserting_before(nodes[entry.node]):
                    nodes[name] = captured.gm.graph.placeholder(name)
                nodes[name].meta = dict(nodes[entry.node].meta)
                old, new = (f"['{index}']" for index in (place[0], layer))
                inputs.append(replace(entry, node=nodes[name].name, source=entry.source.replace(old, new, 1)))
            node.replace_input_with(nodes[entry.node], nodes[name])
    return replace(captured, inputs=tuple(inputs))


def assign_layers(steps: Iterable[Step], is_cut: Callable[[Piece], bool], locations: Locations) -> list[Step]:
    """Give each step the layer whose unit it belongs to: that of the last cut before it, or its own if it is one."""
    layer: int | None = None
    assigned: list[Step] = []
    for step in steps:
        assert isinstance(step, Piece)
        if is_cut(step):
            places = [locations.own[name] for name in step.inputs if name in locations.own]
            layer = min((place[0] for place in places), default=layer)
        assigned.append(replace(step, layer=layer))
    return assigned


# -- changes -----------------------------------------------------------------------------------------------------


class Bound:
    """What a program is bound to, to notice when the decoder holds something else. vLLM's own compiled code reads each
    weight anew at each call."""

    def __init__(self) -> None:
        self._checks: dict[tuple[int, Any], tuple[dict[Any, Any], Any, Any]] = {}

    def add(self, owner: Any, source: Source) -> None:
        """Watch each object on the way from an owner to what the program is bound to, with every module on it."""
        objects = source.objects({source.root: owner})
        for holder, access, value in zip(objects, source.path, objects[1:], strict=False):
            table = holder if isinstance(holder, dict) else getattr(holder, "__dict__", None)
            if isinstance(table, dict) and access.name in table:
                self._checks[id(table), access.name] = table, access.name, value

    def is_current(self) -> bool:
        """Whether all of it is what it was."""
        for table, name, value in self._checks.values():  # noqa: SIM110 - twice as fast as all()
            if table.get(name) is not value:
                return False
        return True

    def forms(self) -> list[str]:
        """What compiled code relies on: the layout of each tensor, and the class of each module."""
        return [_form(value) for _, _, value in self._checks.values()]


def _form(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        inner = inner_text(value)
        return f"{tuple(value.shape)} {value.stride()} {value.dtype} {value.device}{inner}"
    return f"{type(value).__module__}.{type(value).__qualname__}"


def tensors_text(decoder: nn.Module) -> list[str]:
    """The layout of every parameter and buffer, by name."""
    both = (*decoder.named_parameters(remove_duplicate=False), *decoder.named_buffers(remove_duplicate=False))
    return [f"{name} {tuple(t.shape)} {t.stride()} {t.dtype} {t.device}" for name, t in both]
