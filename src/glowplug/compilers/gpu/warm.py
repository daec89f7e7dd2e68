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
    """Begin the one-off work of Inductor and Triton in a process that is going to compile, in threads: imports, and
    hashes of both. What is missing is reported by those who need it.

    Args:
        device: the index of the GPU that the calling thread uses; None on a CPU.
    """
    if device is not None:
        open_driver(device)
    begin_thread(functools.partial(_warm_up_inductor, device), "glowplug-warm-up")


def share_triton_cache() -> None:
    """Let Triton keep glowplug's own kernels where Inductor makes it keep those of pieces."""
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(torch.cuda.current_device()))


@functools.cache
def open_driver(device: int) -> None:
    """Begin, once, to let Triton open the GPU's driver, through a helper that it builds in C, and ask its assembler for
    its version. What is missing is reported by those who need it.

    Args:
        device: the index of the GPU that the calling thread uses.
    """

    def work() -> None:
        with contextlib.suppress(Exception), torch.cuda.device(device):  # each thread has its own
            from torch.utils._triton import triton_backend

            triton_backend().hash()

    begin_thread(work, "glowplug-open-driver")


def import_inductor() -> None:
    """Import Inductor and hash torch."""
    import sympy.physics.units  # noqa: F401 - sympy imports it when it first simplifies
    from torch._inductor import compile_fx  # noqa: F401
    from torch._inductor.codecache import torch_key

    torch_key()


def _warm_up_inductor(device: int | None) -> None:
    with contextlib.suppress(Exception):
        import_inductor()
        if device is not None:
            from torch.utils._triton import triton_hash_with_backend

            with torch.cuda.device(device):  # each thread has its own
                triton_hash_with_backend()
