"""How fast `glowplug::expert_linear` is on a GPU: `python benchmarks/gpu/expert_linear.py`.

For the linears of the experts of public models, one line for each number of tokens: microseconds and GB/s, counted in
bytes of the weights of the chosen experts, of the kernel; and microseconds of the two ways without it, one grouped
matrix product with what it needs around it, and a batched one of gathered weights. With `--tune`, the fastest
configurations of the kernel instead. Each time is that of a CUDA graph of several calls with other experts and weights.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import timing
import torch
from torch import Tensor

from glowplug.ops import expert_linear as room
from glowplug.ops.expert_linear import FEW, Config, config_of
from glowplug.ops.triton_kernels import expert_linear_launch

_CALLS = 12
"""Calls of one CUDA graph."""
_WEIGHTS = 3 << 29
"""Bytes of the weights through which these calls go, at least two layers' and far more than the GPU's cache."""


@dataclass(frozen=True)
class Linear:
    """One linear of a model's experts."""

    name: str
    experts: int
    k: int
    n: int
    top_k: int
    transposed: bool
    first: bool = True

    def weight(self, experts: int) -> Tensor:
        shape = (self.k, self.n) if self.transposed else (self.n, self.k)
        return torch.empty(experts, *shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)


LINEARS = (
    Linear("gpt-oss-20b up", 32, 2880, 5760, 4, True),
    Linear("gpt-oss-20b down", 32, 2880, 2880, 4, True, False),
    Linear("qwen3-30b up", 128, 2048, 1536, 8, False),
    Linear("qwen3-30b down", 128, 768, 2048, 8, False, False),
    Linear("glm-4.7 up", 160, 5120, 3072, 8, False),
    Linear("glm-4.7 down", 160, 1536, 5120, 8, False, False),
    Linear("glm-4.7 (8) up", 8, 5120, 3072, 8, False),
    Linear("glm-4.7 (8) down", 8, 1536, 5120, 8, False, False),
)


def launch(
    x: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None, top_k: int, transposed: bool, config: Config
) -> Tensor:
    """The kernel in a configuration."""
    pairs = len(experts)
    output = x.new_empty(pairs, weight.shape[2 if transposed else 1])
    expert_linear_launch(x, weight, experts, bias, output, pairs, top_k, transposed, config).run()
    return output


class Case:
    """Inputs of several calls of a linear for some tokens, each with random distinct experts."""

    def __init__(self, linear: Linear, weights: Sequence[Tensor], tokens: int) -> None:
        self.linear, self.weights = linear, weights
        self.pairs = tokens * linear.top_k
        self.top_k = linear.top_k if linear.first else 1
        self.bias = torch.randn(linear.experts, linear.n, dtype=torch.bfloat16, device="cuda")
        self.inputs = torch.randn(_CALLS, self.pairs // self.top_k, linear.k, dtype=torch.bfloat16, device="cuda")
        scores = torch.rand(_CALLS, tokens, linear.experts, device="cuda")
        self.experts = scores.topk(linear.top_k).indices.reshape(_CALLS, -1)
        chosen = statistics.mean(len(ids.unique()) for ids in self.experts)
        self.bytes = chosen * linear.n * linear.k * 2

    def calls(self, run: Callable[..., Tensor]) -> Iterator[Tensor]:
        for number in range(_CALLS):
            weight = self.weights[number % len(self.weights)]
            bias = self.bias if self.linear.transposed else None
            yield run(self.inputs[number], weight, self.experts[number], bias, self.top_k, self.linear.transposed)

    def microseconds(self, run: Callable[..., Tensor], repeats: int = 15) -> float:
        """The median time of a call."""
        return timing.microseconds(lambda: self.calls(run), _CALLS, repeats)

    def by_kernel(self, config: Config) -> Callable[..., Tensor]:
        return lambda *arguments: launch(*arguments, config)

    def config(self) -> Config:
        linear = self.linear
        return config_of(self.pairs, linear.experts, linear.n, linear.k, linear.transposed)

    def agrees(self, config: Config) -> bool:
        """Whether the kernel agrees with gathered weights."""
        output, expected = (next(self.calls(run)).float() for run in (self.by_kernel(config), room._gathered))
        return float((output - expected).norm() / expected.norm()) < 1e-2


def candidates(config: Config) -> Iterator[Config]:
    """Configurations worth a try in the place of one."""
    rows = (16,) if config.pairs <= 64 and config.block_m == 16 else (16, 32, 64)
    for m, n, k, stages, warps in itertools.product(rows, (32, 64, 128), (64, 128, 256), (3, 4, 5, 6), (4, 8)):
        block, buffers = (m + n) * k * 2, stages - 1
        in_flight = n * k * 2 * (buffers - 1)
        few_rows = len(rows) == 1
        if block * buffers > 200 << 10 or n * k > 128 * 128 or (k == 256 and stages > 4):
            continue
        if in_flight < 8 << 10 or (warps == 8 and n == 32) or (not few_rows and (k == 256 or n == 32 or stages > 4)):
            continue
        yield replace(config, block_m=m, block_n=n, block_k=k, stages=stages, warps=warps)


def compile_ahead(jobs: Sequence[tuple[Linear, Config]]) -> None:
    """Compile kernels in other processes, so that they lie in Triton's folder."""
    context = multiprocessing.get_context("spawn")
    workers = min(14, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        failed = sum(pool.map(_compile, jobs, chunksize=2))
    if failed:
        print(f"{failed} of {len(jobs)} configurations don't compile")


def _compile(job: tuple[Linear, Config]) -> bool:
    """Whether a kernel fails. Runs it for a pair of an unknown expert, so that it reads no weights."""
    linear, config = job
    try:
        x = torch.zeros(1, linear.k, dtype=torch.bfloat16, device="cuda")
        experts = torch.full((1,), 99, device="cuda")
        bias = torch.zeros(1, linear.n, dtype=torch.bfloat16, device="cuda") if linear.transposed else None
        launch(x, linear.weight(1), experts, bias, 1, linear.transposed, config)
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def tune(tokens: Sequence[int], linears: Sequence[Linear]) -> None:
    """Print the fastest configurations."""
    started = time.perf_counter()
    jobs: dict[tuple[object, ...], tuple[Linear, Config]] = {}
    for linear, count in itertools.product(linears, tokens):
        if count * linear.top_k <= FEW:
            base = config_of(count * linear.top_k, linear.experts, linear.n, linear.k, linear.transposed)
            for config in candidates(base):
                jobs[config, linear.transposed, linear.k % config.block_k == 0] = (linear, config)
    compile_ahead(list(jobs.values()))
    print(f"{len(jobs)} kernels compiled in {time.perf_counter() - started:.0f} s")
    for linear in linears:
        weights = _weights(linear)
        for count in tokens:
            if count * linear.top_k > FEW:
                continue
            case = Case(linear, weights, count)
            base = case.config()
            times: list[tuple[float, Config]] = []
            for config in candidates(base):
                try:
                    times.append((case.microseconds(case.by_kernel(config), 5), config))
                except Exception:  # too much shared memory, say
                    continue
            times.sort(key=lambda entry: entry[0])
            now = case.microseconds(case.by_kernel(base))
            floor = case.bytes / _copy_speed() / 1000
            head = f"{linear.name}, {count} tokens ({'pair' if base.by_pair else 'expert'}, {base.pairs})"
            print(f"{head}: now {now:.1f} us = {_text(base)}; bytes alone {floor:.1f} us")
            for spent, config in times[:5]:
                right = "" if case.agrees(config) else " WRONG"
                print(f"    {spent:7.1f} us {case.bytes / spent / 1000:6.0f} GB/s  {_text(config)}{right}")
        del weights, case
        torch.cuda.empty_cache()
    print(f"{time.perf_counter() - started:.0f} s")


def _text(config: Config) -> str:
    return f"m{config.block_m} n{config.block_n} k{config.block_k} s{config.stages} w{config.warps}"


def _weights(linear: Linear) -> list[Tensor]:
    size = linear.experts * linear.n * linear.k * 2
    return [linear.weight(linear.experts) for _ in range(max(2, math.ceil(_WEIGHTS / size)))]


_speeds: list[float] = []


def _copy_speed() -> float:
    """GB/s at which the GPU copies, bytes read and bytes written counted."""
    if not _speeds:
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        target.copy_(source)
        begin.record()
        for _ in range(10):
            target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        _speeds.append(20 * source.numel() / begin.elapsed_time(end) / 1e6)
    return _speeds[0]


def gathered(x: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None, top_k: int, transposed: bool) -> Tensor:
    """What transformers' `batched_mm` does for one linear."""
    weights = weight[experts] if transposed else weight[experts].transpose(1, 2)
    output = torch.bmm(x.repeat_interleave(top_k, dim=0).unsqueeze(1), weights).squeeze(1)
    return output if bias is None else output.add_(bias[experts])


def compare(tokens: Sequence[int], linears: Sequence[Linear]) -> None:
    """Print a line for each linear and number of tokens."""
    print(f"{'':18} {'tokens':>6} {'kernel us':>9} {'GB/s':>6} {'grouped us':>10} {'batched us':>10}  configuration")
    for linear in linears:
        weights = _weights(linear)
        for count in tokens:
            case = Case(linear, weights, count)
            grouped = case.microseconds(room._grouped)
            batched = f"{case.microseconds(gathered):10.1f}" if case.pairs <= 64 else f"{'-':>10}"
            kernel, speed, note = "-", "-", ""
            if case.pairs <= FEW:
                config = case.config()
                spent = case.microseconds(case.by_kernel(config))
                kernel, speed, note = f"{spent:.1f}", f"{case.bytes / spent / 1000:.0f}", _text(config)
                if not case.agrees(config):
                    note += " WRONG"
            print(f"{linear.name:18} {count:6} {kernel:>9} {speed:>6} {grouped:10.1f} {batched}  {note}")
        del weights, case
        torch.cuda.empty_cache()


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default=None, help="numbers of tokens, by commas")
    parser.add_argument("--models", default="", help="only linears whose name holds this")
    parser.add_argument("--tune", action="store_true", help="print the fastest configurations")
    options = parser.parse_args()
    tokens = [int(each) for each in (options.tokens or ("1,16" if options.tune else "1,4,16,64")).split(",")]
    linears = [linear for linear in LINEARS if options.models in linear.name]
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copies at {_copy_speed():.0f} GB/s")
    (tune if options.tune else compare)(tokens, linears)


if __name__ == "__main__":
    main()
