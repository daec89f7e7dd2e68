"""How fast `glowplug::linears` is on a GPU: `python benchmarks/gpu/linears.py`.

For the linear layers of public models that have the same input, one line for each number of rows: microseconds of the
kernel, its GB/s in bytes of the weights, and microseconds of torch's linear layers one after the other. Each time is
that of a CUDA graph that goes through copies of the weights, more than the GPU's cache holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import timing
import torch
from torch import Tensor

from glowplug.ops.linears import linears

_BYTES = 400 << 20
"""Bytes of the copies of the weights."""
LAYERS: dict[str, tuple[int, tuple[int, ...], bool]] = {
    "gpt-oss-20b q, k, v": (2880, (4096, 512, 512), True),
    "gpt-oss-20b o": (4096, (2880,), True),
    "gpt-oss-20b router": (2880, (32,), True),
    "gpt-oss-20b head": (2880, (201088,), False),
    "qwen3-30b q, k, v": (2048, (4096, 512, 512), False),
    "qwen3-30b o": (4096, (2048,), False),
    "qwen3-30b router": (2048, (128,), False),
    "qwen3-30b head": (2048, (151936,), False),
    "glm-4.7 q, k, v": (5120, (12288, 1024, 1024), True),
    "glm-4.7 o": (12288, (5120,), False),
    "glm-4.7 gate, up": (5120, (12288, 12288), False),
    "glm-4.7 shared gate, up": (5120, (1536, 1536), False),
    "glm-4.7 shared down": (1536, (5120,), False),
    "glm-4.7 head": (5120, (151552,), False),
}
"""Name -> inputs, outputs of each layer, and whether they have a bias."""

Run = Callable[[Tensor, list[Tensor], list[Tensor | None]], Sequence[Tensor]]


def one_by_one(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """Torch's linear layers."""
    return [torch.nn.functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def microseconds(run: Run, x: Tensor, copies: Sequence[list[Tensor]], biases: list[Tensor | None]) -> float:
    """The median time of a call."""
    return timing.microseconds(lambda: (run(x, weights, biases) for weights in copies), len(copies))


def main() -> None:
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'':24} {'rows':>4} {'kernel us':>9} {'GB/s':>6} {'torch us':>9}")
    for name, (k, outputs, has_bias) in LAYERS.items():
        size = sum(outputs) * k * 2

        def random(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)

        copies = [[random(n, k) for n in outputs] for _ in range(min(48, max(2, math.ceil(_BYTES / size))))]
        biases: list[Tensor | None] = [random(n) if has_bias else None for n in outputs]
        for rows in (1, 4, 16):
            x = random(rows, k)
            pairs = zip(linears(x, copies[0], biases), one_by_one(x, copies[0], biases), strict=True)
            wrong = any((a.float() - b.float()).norm() > 0.01 * b.float().norm() for a, b in pairs)
            kernel, torch_s = (microseconds(run, x, copies, biases) for run in (linears, one_by_one))
            note = "  WRONG" if wrong else ""
            print(f"{name:24} {rows:4} {kernel:9.1f} {size / kernel / 1000:6.0f} {torch_s:9.1f}{note}", flush=True)


if __name__ == "__main__":
    main()
