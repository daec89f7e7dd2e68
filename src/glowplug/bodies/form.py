"""How an op is called, as read from a trace. This determines the inputs with which its body is traced and tried, and
the calls that the body serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from glowplug.graph.capture import Captured
from glowplug.layers.registry import LayerRegistry
from glowplug.ops.arguments import parse
from glowplug.ops.layer_op import find_layer_op

ATTENTION, EXPERTS, BLOCK = "glowplug::attention", "glowplug::moe_forward", "glowplug::moe_forward_shared"

Content = Literal["values", "choices", "shares", "mask", "positions"]
_CALLS: Mapping[str, tuple[tuple[Content, tuple[str, ...]], ...]] = {
    ATTENTION: (
        ("values", ("batch", "", "tokens", "")),
        ("values", ("batch", "", "kv_tokens", "")),
        ("values", ("batch", "", "kv_tokens", "")),
        ("mask", ("batch", "", "tokens", "kv_tokens")),
    ),
    EXPERTS: (("values", ("tokens", "")), ("choices", ("tokens", "")), ("shares", ("tokens", ""))),
    BLOCK: (("values", ("batch", "tokens", "")),),
}
"""Op -> for each tensor its content and the names of its sizes; `""` for a size that does not vary."""
_ROUTED: tuple[tuple[Content, tuple[str, ...]], ...] = (("values", ("routed_tokens", "")),)
"""The same for experts that take tokens which are already routed."""


@dataclass(frozen=True)
class Argument:
    """One tensor that an op is called with.

    Attributes:
        sizes: its shape; a size that varies from call to call is a name.
        dtype: its dtype.
        content: `"choices"` are experts, distinct in each row; `"shares"` add up to 1 in each row; a `"mask"` is
            causal; a body must not compute with `"positions"`, as a trial can't know which ones a function expects.
        order: its dims in memory order, the outermost first; empty if it is contiguous.
    """

    sizes: tuple[int | str, ...]
    dtype: torch.dtype
    content: Content
    order: tuple[int, ...] = ()

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape in a call with these sizes."""
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.sizes)

    def make(self, sizes: Mapping[str, int], generator: torch.Generator | None) -> Tensor:
        """A tensor for a call with these sizes: random, or zeros without a generator."""
        shape = self.shape(sizes)
        if self.content == "mask":
            seen = torch.ones(shape, dtype=torch.bool).tril(shape[-1] - shape[-2])
            if self.dtype is torch.bool:
                return seen
            return torch.zeros(shape, dtype=self.dtype).masked_fill(~seen, torch.finfo(self.dtype).min)
        if self.content == "positions":
            return torch.arange(shape[-1], dtype=self.dtype).expand(shape)
        if generator is None:
            tensor = torch.zeros(shape)
        elif self.content == "choices":
            tensor = torch.rand(*shape[:-1], sizes["experts"], generator=generator).argsort(-1)[..., : shape[-1]]
        else:
            tensor = torch.rand(shape, generator=generator)
            tensor = tensor / tensor.sum(-1, keepdim=True) if self.content == "shares" else tensor * 2 - 1
        order = self.order or range(len(shape))
        laid_out = tensor.to(self.dtype).permute(*order).contiguous()
        return laid_out.permute(*map(order.index, range(len(shape))))


@dataclass(frozen=True)
class CallForm:
    """How an op is called.

    Attributes:
        op: the op's name.
        arguments: its tensor arguments.
        constants: its other keyword arguments, see `glowplug.ops.arguments.encode`.
    """

    op: str
    arguments: tuple[Argument, ...]
    constants: str = ""

    def make(
        self, sizes: Mapping[str, int], device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Tensors for a call with these sizes: random ones for a trial; without a generator, zeros for a trace, with
        the varying sizes marked as dynamic."""
        tensors = tuple(argument.make(sizes, generator).to(device) for argument in self.arguments)
        for tensor, argument in zip(tensors, self.arguments, strict=True) if generator is None else ():
            for dim in (dim for dim, size in enumerate(argument.sizes) if isinstance(size, str)):
                torch._dynamo.mark_dynamic(tensor, dim)
        return tensors

    def check(self, relations: Sequence[str]) -> Callable[..., bool]:
        """A function that checks whether tensors fit this form and `relations`, expressions over `shape_0` and so on.
        It is compiled from one expression, as it runs at every call."""
        varying: dict[str, str] = {}
        checks: list[str] = []
        for number, argument in enumerate(self.arguments):
            if argument.content != "positions":
                it, shape = f"tensor_{number}", f"shape_{number}"
                sizes = [
                    str(size) if isinstance(size, int) else varying.setdefault(size, f"{shape}[{dim}]")
                    for dim, size in enumerate(argument.sizes)
                ]
                laid_out = f"{it}.permute({argument.order})" if argument.order else it
                checks += [
                    f"{it} is not None and {it}.dtype is {argument.dtype}",
                    f"len({shape} := {it}.shape) == {len(sizes)} and {shape} == ({', '.join(sizes)},)",
                    f"{laid_out}.is_contiguous()",
                ]
        names = ", ".join(f"tensor_{number}" for number in range(len(self.arguments)))
        check: Callable[..., bool] = eval(f"lambda {names}: {' and '.join([*checks, *relations])}", {"torch": torch})
        return check

    def to_facts(self) -> list[Any]:
        """This form as plain values, for a record."""
        arguments = [[list(a.sizes), str(a.dtype)[6:], a.content, list(a.order)] for a in self.arguments]
        return [self.op, arguments, self.constants]

    @classmethod
    def from_facts(cls, facts: Sequence[Any]) -> CallForm:
        """The form that `to_facts` returned as plain values."""
        op, rows, constants = facts
        arguments = [
            Argument(tuple(sizes), getattr(torch, dtype), content, tuple(order))
            for sizes, dtype, content, order in rows
        ]
        return cls(op, tuple(arguments), constants)


Forms = dict[str, CallForm | None]
"""Name of a layer -> how its op is called; None if that varies or can't be described."""


def read_forms(captured: Captured, registry: LayerRegistry, masks: Mapping[str, Tensor]) -> Forms:
    """How each traced layer's op is called. `masks` maps the source of a mask in the trace to the mask of a call."""
    handles = {entry.node: entry.value.name for entry in captured.inputs if entry.type == "handle"}
    call_masks = {entry.node: masks[entry.source] for entry in captured.inputs if entry.source in masks}
    calls: dict[str, list[fx.Node]] = {}
    for node in captured.gm.graph.nodes:
        op = find_layer_op(node.target) if node.op == "call_function" else None
        if op is not None and op.name in _CALLS:
            calls.setdefault(op.name, []).append(node)
    forms: Forms = {}
    for name, nodes in calls.items():
        hoisted = isinstance(nodes[0].args[0], fx.Node)  # without handles, calls are in order
        layers = [handles[str(node.args[0])] for node in nodes] if hoisted else registry.order(name)
        for layer, node in zip(layers, nodes, strict=True) if len(layers) == len(nodes) else ():
            try:
                form: CallForm | None = _read_form(name, node.args[1:], call_masks)
            except (KeyError, ValueError):  # more sizes vary than in `_CALLS`, or a call has no such mask
                form = None
            forms[layer] = form if forms.get(layer, form) == form else None
    return forms


def _read_form(op: str, args: Sequence[Any], masks: Mapping[str, Tensor]) -> CallForm:
    if op != ATTENTION:
        tensors = [node for node in args if node is not None]
        described = _CALLS[op] if len(tensors) == len(args) else _ROUTED
        return CallForm(op, tuple(_read(node, *entry, masks) for node, entry in zip(tensors, described, strict=True)))
    *tensors, further, constants = args
    if not all(isinstance(place, int) for _, place in parse(constants)[1]):
        raise ValueError("tensors in tuples")
    arguments = [_read(node, *entry, masks) for node, entry in zip(tensors, _CALLS[op], strict=True)]
    for node in further:
        fake = node.meta["example_value"]
        weight = fake.dtype.is_floating_point
        names = ("",) * fake.dim() if weight else ("batch", "tokens")
        arguments.append(_read(node, "values" if weight else "positions", names, masks))
    return CallForm(op, tuple(arguments), constants)


def _read(node: fx.Node, content: Content, names: Sequence[str], masks: Mapping[str, Tensor]) -> Argument:
    if content == "mask":  # the trace has only a stand-in, without the mask's shape
        return Argument(("batch", 1, "tokens", "kv_tokens"), masks[str(node)].dtype, content)
    fake = node.meta["example_value"]
    sizes = tuple(size if isinstance(size, int) else name for size, name in zip(fake.shape, names, strict=True))
    if "" in sizes:
        raise ValueError("a size varies")
    # Read hints: comparing symbolic strides would add guards to the trace.
    strides: list[int] = [stride if isinstance(stride, int) else stride.node.hint for stride in fake.stride()]
    order = tuple(sorted(range(len(strides)), key=lambda dim: -strides[dim]))
    return Argument(sizes, fake.dtype, content, order if order != tuple(range(len(strides))) else ())
