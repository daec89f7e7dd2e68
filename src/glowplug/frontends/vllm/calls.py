"""Reads the calls of a decoder. Its arguments are tensors, mostly of as many rows as there are tokens, and None."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from glowplug.graph.sources import parse

MODEL, TENSORS = "model", "tensors"
"""The arguments of the traced function."""


@dataclass(frozen=True)
class DecoderCall:
    """A call of a decoder.

    Attributes:
        names: the arguments that are tensors, in the order of the signature.
        tensors: these tensors.
        constants: the other arguments, by name: None, numbers and texts.
        dynamic: for each tensor, the dims that vary from call to call.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    constants: Mapping[str, Any]
    dynamic: tuple[tuple[int, ...], ...]

    @property
    def pattern(self) -> tuple[Any, ...]:
        """What a program is made for: a call that differs in it needs another program."""
        forms = tuple((name, tensor.dtype, tensor.dim()) for name, tensor in zip(self.names, self.tensors, strict=True))
        return forms, tuple(sorted(self.constants.items(), key=repr))

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return min(self._sizes(), default=0)

    def _sizes(self) -> list[int]:
        pairs = zip(self.tensors, self.dynamic, strict=True)
        return [tensor.shape[dim] for tensor, dims in pairs for dim in dims]

    def distinct(self, tokens: int, stride: int) -> DecoderCall:
        """The same call for a few tokens that all differ: whole numbers, such as token ids and positions, count up by
        `stride`, and other numbers are noise. In a dummy batch all tokens may be equal, or at position 0."""
        tensors = []
        for number, (tensor, dims) in enumerate(zip(self.tensors, self.dynamic, strict=True)):
            for dim in dims:
                tensor = tensor.narrow(dim, 0, tokens)
            generator = torch.Generator(tensor.device).manual_seed(number)
            if not dims:
                tensors.append(tensor.clone())
            elif tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=torch.float32)
                tensors.append(noise.to(tensor.dtype))
            else:
                steps = torch.arange(tokens, device=tensor.device, dtype=tensor.dtype) * stride
                shape = [tokens if dim == dims[0] else 1 for dim in range(tensor.dim())]
                tensors.append(steps.view(shape).expand(tensor.shape).clone())
        return DecoderCall(self.names, tuple(tensors), self.constants, self.dynamic)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the call."""
        return {**self.constants, **dict(zip(self.names, self.tensors, strict=True))}

    def examples(self) -> list[Tensor]:
        """Aliases of the tensors to trace with, their dims marked as dynamic."""
        examples = []
        for tensor, dims in zip(self.tensors, self.dynamic, strict=True):
            example = tensor.detach()
            for dim in dims:
                torch._dynamo.mark_dynamic(example, dim)
            examples.append(example)
        return examples

    def function(self) -> Callable[[nn.Module, list[Tensor]], tuple[Any, ...]]:
        """The decoder's forward as a function that returns a flat tuple."""
        names, constants = self.names, dict(self.constants)

        def run(model: nn.Module, tensors: list[Tensor]) -> tuple[Any, ...]:
            arguments = {name: tensors[number] for number, name in enumerate(names)}
            return tuple(pytree.tree_leaves(type(model).forward(model, **arguments, **constants)))

        return run


def read_call(decoder: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> DecoderCall | str:
    """Read a call; or why it can't be served, in one sentence."""
    bound = inspect.signature(type(decoder).forward).bind(decoder, *args, **kwargs)
    bound.apply_defaults()
    _, *given = bound.arguments.items()
    tensors: list[tuple[str, Tensor]] = []
    constants: dict[str, Any] = {}
    declared = bound.signature.parameters
    for name, value in given:
        if declared[name].kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
            if value:
                return f"it is called with further arguments, such as {next(iter(value))!r}"
        elif isinstance(value, Tensor):
            tensors.append((name, value))
        elif value is None or isinstance(value, (bool, int, float, str)):
            constants[name] = value
        else:
            return f"its argument {name} is a {type(value).__name__}"
    if not tensors:
        return "it is called without tensors"
    dynamic = [_dims(decoder._dynamic_arg_dims.get(name), tensor.dim()) for name, tensor in tensors]
    if not any(dynamic):
        return "none of its arguments varies in size"
    names, values = zip(*tensors, strict=True)
    return DecoderCall(names, values, constants, tuple(dynamic))


def _dims(declared: Any, count: int) -> tuple[int, ...]:
    """The dims that a decoder declares as varying, from 0."""
    if declared is None:
        return ()
    listed = [declared] if isinstance(declared, int) else list(declared)
    return tuple(dim % count for dim in listed)


def argument(source: str) -> tuple[int, int | None] | None:
    """(index of a call's tensor, dim if the source is a size of it); None if the source is no argument."""
    parsed = parse(source)
    if parsed is None or parsed.is_global or parsed.root != TENSORS or len(parsed.path) != 1:
        return None
    return parsed.path[0].name, parsed.size


def readers(sources: Sequence[str], model: nn.Module) -> list[Callable[[Sequence[Tensor]], Any]]:
    """For each argument of a program, a function that reads it from the tensors of a call. What is neither a tensor of
    a call nor in the model, such as a mask in vLLM's forward context, is read anew at each call."""
    return [_reader(source, model) for source in sources]


def _reader(source: str, model: nn.Module) -> Callable[[Sequence[Tensor]], Any]:
    place = argument(source)
    if place is not None:
        number, dim = place
        return (lambda tensors: tensors[number]) if dim is None else (lambda tensors: tensors[number].shape[dim])
    parsed = parse(source)
    assert parsed is not None
    arguments = {MODEL: model}
    if parsed.size is None:
        return lambda _: parsed.value(arguments)
    return lambda _: parsed.value(arguments).shape[parsed.size]
