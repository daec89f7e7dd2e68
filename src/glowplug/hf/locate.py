"""Finds the first layer at which a stamped program leaves the model's own forward, once it is known that it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glowplug.closeness import distance
from glowplug.layers.stack import LayerStack
from glowplug.program import Program


def first_layer(
    program: Program, stack: LayerStack, run_program: Callable[[Program], Any], run_eager: Callable[[], Any]
) -> int | None:
    """The first layer whose output no step of the program gave.

    Args:
        program: a stamped program with uncompiled pieces.
        stack: the layers that it runs.
        run_program: runs a program on some call.
        run_eager: runs the model's forward on the same call.

    Returns:
        The layer's index; None when the program hands no layer's output from piece to piece, so that none can be told.
    """
    expected: dict[int, Tensor] = {}
    hooks = [layer.register_forward_hook(_keep(expected, index)) for index, layer in enumerate(stack.layers)]
    try:
        run_eager()
    finally:
        for hook in hooks:
            hook.remove()
    calls: list[tuple[Any, ...]] = []
    run_program(_recording(program, calls))
    outputs = _by_layer(program, calls, stack.path)
    met = False
    for index in range(len(stack.layers) - 1):
        wanted = expected.get(index)
        if wanted is None:
            return index
        holder = max((layer for layer in outputs if layer <= index), default=-1)  # a layer may have no op
        if any(_same(value, wanted) for value in outputs.get(holder, [])):
            met = True
        else:
            return index if met or index == 0 else None
    return len(stack.layers) - 1 if met else None


def _keep(kept: dict[int, Tensor], index: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if isinstance(value, Tensor):
            kept[index] = value

    return hook


def _recording(program: Program, calls: list[tuple[Any, ...]]) -> Program:
    """The same program, its pieces noting what they returned."""

    def note(piece: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = piece(*args)
            calls.append(tuple(result))
            return result

        return call

    return program.with_slots({slot: note(run) for slot, run in program.slots.items()})


def _by_layer(program: Program, calls: list[tuple[Any, ...]], path: str) -> dict[int, list[Any]]:
    """What the pieces behind each layer's first op returned."""
    found: dict[int, list[Any]] = {}
    layer = -1
    remaining = iter(calls)
    for step in program.outline:
        if step.op is None:
            found.setdefault(layer, []).extend(next(remaining))
        else:
            inside = [source for source in step.sources if source.startswith(f"{path}.")]
            layer = int(inside[0][len(path) + 1 :].partition(".")[0])
    return found


def _same(value: Any, wanted: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.shape != wanted.shape or value.dtype != wanted.dtype:
        return False
    return distance(value, wanted) <= (0.01 if torch.finfo(wanted.dtype).bits < 32 else 1e-5)
