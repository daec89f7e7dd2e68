"""What one call of a layer op costs: through `torch.library.custom_op`, through glowplug's op, and in a program.

    python benchmarks/dispatch.py

The op's body is `x + 1` on four numbers, so that the rest is dispatch. Microseconds a call, the median of many rounds
that take turns, on one thread; the same body called as plain Python is the floor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import glowplug

CALLS, ROUNDS = 2000, 41


class Layer(nn.Module):
    """A layer that knows nothing."""


@glowplug.layer_op("dispatch::layer_op", fake=lambda x: torch.empty_like(x))
def through_layer_op(layer: Layer, x: Tensor) -> Tensor:
    """The body."""
    return x + 1


@torch.library.custom_op("dispatch::custom_op", mutates_args=())
def through_custom_op(layer: str, x: Tensor) -> Tensor:
    """The same body, with the layer's name."""
    layers[layer]
    return x + 1


@through_custom_op.register_fake
def _(layer: str, x: Tensor) -> Tensor:
    return torch.empty_like(x)


layers = {"layers.0": Layer()}


def contenders() -> dict[str, Callable[[Tensor], Tensor]]:
    """What is compared."""
    layer = layers["layers.0"]
    model = nn.Module()
    model.add_module("layer", layer)
    registry = glowplug.register_layers(model)
    handle = registry.handles["layer"]
    hoisted = torch.ops.dispatch.layer_op.hoisted
    named = torch.ops.dispatch.custom_op.default
    body = through_layer_op.layer_op.fn  # type: ignore[attr-defined]
    return {
        "the body alone": lambda x: x + 1,
        "in a program: the function, called directly": lambda x: body(layer, x),
        "glowplug layer op, through the dispatcher": lambda x: hoisted(handle, x),
        "torch.library.custom_op, through the dispatcher": lambda x: named("layers.0", x),
    }


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    x = torch.ones(4)
    chosen = contenders()
    times: dict[str, list[float]] = {name: [] for name in chosen}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for name, call in chosen.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    call(x)
                times[name].append((time.perf_counter() - start) / CALLS * 1e6)
    floor = statistics.median(times["the body alone"])
    print(f"torch {torch.__version__}")
    for name, taken in times.items():
        median = statistics.median(taken)
        print(f"{median:7.2f} us  {median - floor:+7.2f} us  {name}")


if __name__ == "__main__":
    main()
