"""The one-off work of Inductor and Triton, and their tuning."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from glowplug.runtime.forks import begin_thread


@contextlib.contextmanager
def quick_tuning() -> Iterator[None]:
    """In this context, measure each configuration of a kernel 20 times instead of 100, which takes a few milliseconds:
    the kernels of a program are tuned in its first runs."""
    module: Any = sys.modules.get("torch._inductor.runtime.benchmarking")
    benchmarker: Any = getattr(module, "benchmarker", None)
    own = getattr(benchmarker, "benchmark_gpu", None)
    if own is None or "benchmark_gpu" in vars(benchmarker):
        yield
        return
    benchmarker.benchmark_gpu = functools.partial(own, memory_warmup_iters=10, benchmark_iters=20)
    try:
        yield
    finally:
        del benchmarker.benchmark_gpu


def warm_up(device: int | None) -> None:
    """Begin the one-off work of Inductor and Triton, in threads: imports, and hashes of both. What is missing is
    reported by those who need it.

    Args:
        device: the index of the GPU that the calling thread uses; None on a CPU.
    """
    if device is not None:
        hash_triton(device)
    begin_thread(_warm_up_inductor, "glowplug-warm-up")


def share_triton_cache() -> None:
    """Let Triton keep glowplug's own kernels where Inductor makes it keep those of pieces."""
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(torch.cuda.current_device()))


@functools.cache
def hash_triton(device: int) -> None:
    """Begin, once, to hash Triton, by which kernels are named, and to compile its driver. A thread does both, and they
    leave the interpreter to others.

    Args:
        device: the index of the GPU that the calling thread uses.
    """

    def work() -> None:
        with contextlib.suppress(Exception), torch.cuda.device(device):  # each thread has its own
            from torch.utils._triton import triton_hash_with_backend
            from triton.compiler import code_generator  # noqa: F401

            triton_hash_with_backend()

    begin_thread(work, "glowplug-hash-triton")


def import_inductor() -> None:
    """Import Inductor and hash torch."""
    import sympy.physics.units  # noqa: F401 - sympy imports it when it first simplifies
    from torch._inductor import compile_fx  # noqa: F401
    from torch._inductor.codecache import torch_key

    torch_key()


def _warm_up_inductor() -> None:
    with contextlib.suppress(Exception):
        import_inductor()
