"""Compiles pieces for a GPU in forks of a process that already uses it. A fork must not call the GPU's driver.

Compilation only asks torch and Triton about the GPU, so a fork answers from what its parent noted (`Gpu`). What would
run on the GPU is done before the fork (Inductor's patterns) or after it (loading and tuning kernels). If a fork calls
the driver nonetheless, it fails, and the parent compiles the piece. Uses private parts of torch and Triton; checked on
torch 2.11 with Triton 3.6.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from glowplug.background.job import Job, Say
from glowplug.runtime.forks import begin_thread, fork_workers

if TYPE_CHECKING:
    from glowplug.ops.triton_kernels import Launch

logger = logging.getLogger("glowplug")


@dataclass(frozen=True)
class Gpu:
    """What compilation asks about the GPUs of a process.

    Attributes:
        current: the index of the current one.
        properties: those of each GPU.
        capabilities: the compute capability of each.
        names: the name of each.
        target: Triton's description of the current one.
    """

    current: int
    properties: tuple[Any, ...]
    capabilities: tuple[tuple[int, int], ...]
    names: tuple[str, ...]
    target: Any

    @classmethod
    def note(cls) -> Gpu:
        """Note what compilation asks about this process's GPUs, and do what it would run on them."""
        from torch._inductor.codecache import CacheBase
        from torch._inductor.fx_passes import joint_graph, post_grad
        from torch._inductor.runtime.hints import DeviceProperties
        from torch.utils._triton import has_triton, triton_hash_with_backend
        from triton.runtime.driver import driver

        current, count = torch.cuda.current_device(), torch.cuda.device_count()
        device = torch.device("cuda", current)
        joint_graph.lazy_init(device)
        post_grad.lazy_init()
        DeviceProperties.create(device)
        has_triton()
        triton_hash_with_backend()
        CacheBase.get_system()
        return cls(
            current,
            tuple(map(torch.cuda.get_device_properties, range(count))),
            tuple(map(torch.cuda.get_device_capability, range(count))),
            tuple(map(torch.cuda.get_device_name, range(count))),
            driver.active.get_current_target(),
        )

    def stand_in(self) -> None:
        """In a fork: let torch and Triton answer from these notes, for as long as the fork lives."""
        from torch._subclasses import fake_tensor
        from triton.runtime.driver import driver

        state = torch.zeros(16, dtype=torch.uint8, device="cpu")
        for module in (torch.cuda, torch.cuda.random):
            vars(module).update(
                current_device=lambda: self.current,
                get_rng_state=lambda device="cuda": state,
                set_rng_state=lambda new_state, device="cuda": None,
            )
        vars(torch.cuda).update(
            _is_in_bad_fork=lambda: False,
            _lazy_init=lambda: None,
            _exchange_device=lambda index: self.current,
            _maybe_exchange_device=lambda index: self.current,
            is_available=lambda: True,
            is_initialized=lambda: True,
            device_count=lambda: len(self.names),
            synchronize=lambda device=None: None,
            get_device_properties=lambda device=None: self.properties[self._index(device)],
            get_device_capability=lambda device=None: self.capabilities[self._index(device)],
            get_device_name=lambda device=None: self.names[self._index(device)],
        )
        vars(fake_tensor).update(init_gpu_context=lambda device: None)
        vars(driver.active).update(
            get_current_target=lambda: self.target,
            get_current_device=lambda: self.current,
            get_current_stream=lambda device=None: 0,
            get_device_capability=lambda device=None: self.capabilities[self._index(device)],
        )
        _index_without_guard()
        _call_without_guard()
        _fold_constants_on_cpu()

    def _index(self, device: Any) -> int:
        if isinstance(device, int):
            return device
        index = torch.device(device).index if device is not None else None
        return self.current if index is None else int(index)


class _Kernels:
    """In a fork: the kernels of a piece, which are compiled at once when all are known, and not loaded."""

    _PROCESSES = 8
    """Processes that compile the kernels of one piece."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Any, str | None]] = []

    def begin(self) -> None:
        """Begin a piece. What waits is of one that failed."""
        self._waiting.clear()

    def add(self, tuner: Any, key: str | None) -> None:
        """A kernel, and the key by which it is bundled with its piece."""
        self._waiting.append((tuner, key))

    def compile(self) -> None:
        """Compile them. Processes put them into Triton's cache, where this one finds them: each kernel is compiled in
        up to five configurations, over which it is to be tuned, and most of a compilation holds the interpreter."""
        from torch._inductor.triton_bundler import TritonBundler

        waiting = list(self._waiting)
        self._waiting.clear()
        parts = []
        for tuner, _ in waiting:
            for configuration in tuner.configs if not tuner.compile_results else ():
                parts.append(copy.copy(tuner))
                parts[-1].configs = [configuration]
        workers = min(len(parts), self._PROCESSES, len(os.sched_getaffinity(0)))
        if workers > 1:
            fork_workers([functools.partial(_compile_into_cache, parts[at::workers]) for at in range(workers)])
        for tuner, key in waiting:
            tuner._precompile_worker()
            if key is not None and tuner.is_statically_launchable():
                TritonBundler.put_static_autotuner(key, tuner)

    def take_over(self) -> None:
        """Let Inductor compile kernels in this way."""
        from torch._inductor.async_compile import AsyncCompile
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        own = AsyncCompile.wait

        def precompile(
            tuner: Any,
            warm_cache_only: bool = False,
            reload_kernel: Any = None,
            static_triton_bundle_key: str | None = None,
        ) -> None:
            self.add(tuner, static_triton_bundle_key)

        def wait(compiler: Any, scope: dict[str, Any]) -> None:
            own(compiler, scope)
            self.compile()

        CachingAutotuner.precompile = precompile
        AsyncCompile.wait = wait


def _compile_into_cache(tuners: Sequence[Any]) -> None:
    for tuner in tuners:
        with contextlib.suppress(Exception):  # raised again by the process that waits
            tuner._precompile_worker()


def _index_without_guard() -> None:
    """Index tensors by the ops that torch's own indexing comes down to: that one asks the driver for the device."""
    own = torch.Tensor.__getitem__

    def getitem(tensor: Any, index: Any) -> Any:
        items = list(index) if isinstance(index, tuple) else [index]
        plain = (int, torch.SymInt, slice, type(None), type(Ellipsis), torch.Tensor)
        masks = (torch.bool, torch.uint8)
        is_plain = all(isinstance(item, plain) and not isinstance(item, bool) for item in items)
        if not is_plain or any(getattr(item, "dtype", None) in masks for item in items):
            return own(tensor, index)
        at = next((place for place, item in enumerate(items) if item is Ellipsis), None)
        if at is not None:
            missing = tensor.dim() - sum(item is not None and item is not Ellipsis for item in items)
            items[at : at + 1] = [slice(None)] * missing
        dim = 0
        chosen: dict[int, Any] = {}
        for item in items:
            if item is None:
                tensor = tensor.unsqueeze(dim)
            elif isinstance(item, slice):
                if item != slice(None):
                    tensor = torch.ops.aten.slice.Tensor(tensor, dim, item.start, item.stop, item.step or 1)
            elif isinstance(item, torch.Tensor):
                chosen[dim] = item
            else:
                tensor = tensor.select(dim, item)
                dim -= 1
            dim += 1
        if not chosen:
            return tensor
        return torch.ops.aten.index.Tensor(tensor, [chosen.get(at) for at in range(max(chosen) + 1)])

    torch.Tensor.__getitem__ = getitem  # type: ignore[method-assign]


def _call_without_guard() -> None:
    """The same for methods whose bindings torch wrote by hand."""
    aten = torch.ops.aten

    def contiguous(tensor: Any, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
        laid_out = tensor.is_contiguous(memory_format=memory_format)
        return tensor if laid_out else aten.clone.default(tensor, memory_format=memory_format)

    def copy_(tensor: Any, source: Any, non_blocking: bool = False) -> Any:
        return aten.copy_.default(tensor, source, non_blocking)

    for name, method in {"__invert__": aten.bitwise_not.default, "contiguous": contiguous, "copy_": copy_}.items():
        setattr(torch.Tensor, name, lambda tensor, *args, run=method, **kwargs: run(tensor, *args, **kwargs))


def _fold_constants_on_cpu() -> None:
    """Compute the constants that Inductor replaces by numbers, such as a mask's minus infinity, on the CPU."""
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder

    own = UniformValueConstantFolder._deduce_value

    def deduce_value(folder: Any, node: Any) -> Any:
        kwargs = node.kwargs
        if torch.device(kwargs.get("device") or "cpu").type == "cpu":
            return own(folder, node)
        node.kwargs = {**kwargs, "device": torch.device("cpu")}
        try:
            return own(folder, node)
        finally:
            node.kwargs = kwargs

    UniformValueConstantFolder._deduce_value = deduce_value


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
        begin_thread(functools.partial(_warm_up_triton, device), "glowplug-warm-up-triton")
    begin_thread(_warm_up_inductor, "glowplug-warm-up")


def _warm_up_triton(device: int) -> None:
    """Hash Triton and compile its driver, both of which leave the interpreter to other threads."""
    with contextlib.suppress(Exception), torch.cuda.device(device):  # each thread has its own
        from torch.utils._triton import triton_hash_with_backend
        from triton.compiler import code_generator  # noqa: F401

        triton_hash_with_backend()


def _warm_up_inductor() -> None:
    with contextlib.suppress(Exception):
        import sympy.physics.units  # noqa: F401 - sympy imports it when it first simplifies
        from torch._inductor import compile_fx  # noqa: F401
        from torch._inductor.codecache import torch_key

        torch_key()


class GpuForks:
    """Lets forks of this process compile for its GPU."""

    _PROCESSES = 6
    """Processes that compile glowplug's own kernels."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._gpu: Gpu | None = None
        self._kernels: _Kernels | None = None  # of this process, if it is a fork
        self._jobs: list[Job] = []

    def compile(self, launches: Sequence[Launch]) -> None:
        """Compile kernels in forks, into Triton's cache. Whatever fails there fails again where a kernel is needed."""
        workers = min(len(launches), self._PROCESSES) if self._gpu is not None else 0

        def work(number: int, say: Say) -> None:
            self.enter()
            for launch in launches[number::workers]:
                with contextlib.suppress(Exception):
                    launch.compile()

        self._jobs = [Job.fork(functools.partial(work, number), nice=0) for number in range(workers)]

    def prepare(self) -> bool:
        """Call before forking. Returns whether forks can compile: not if this process uses no GPU, or if torch or
        Triton lack something that they need."""
        if self._gpu is None and torch.cuda.is_initialized():
            try:
                self._gpu = Gpu.note()
            except Exception:
                logger.debug("glowplug: pieces can't be compiled in forks", exc_info=True)
        return self._gpu is not None

    def enter(self) -> bool:
        """Call before compiling. Returns whether this process is such a fork, and lets it compile."""
        if self._gpu is None or os.getpid() == self._process:
            return False
        if self._kernels is None:
            self._gpu.stand_in()
            self._kernels = _Kernels()
            self._kernels.take_over()
        self._kernels.begin()
        return True
