"""Compiles pieces for a GPU in forks of a process that already uses it.

What would run on the GPU is done by the process that loads the pieces: it loads kernels and tunes them. Uses private
parts of Inductor; checked on torch 2.11 with Triton 3.6.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from glowplug.background.job import Job, Say, in_fork
from glowplug.compilers.gpu.notes import Gpu, driver_folder
from glowplug.compilers.gpu.warm import import_inductor, share_triton_cache
from glowplug.runtime.forks import fork_workers

if TYPE_CHECKING:
    from glowplug.ops.triton_kernels import Launch

logger = logging.getLogger("glowplug")


class GpuForks:
    """Lets forks of this process compile for its GPU."""

    _PROCESSES = 6
    """Processes that compile glowplug's own kernels."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._gpu: Gpu | None = None
        self._stands_in = False  # in this process
        self._kernels: _Kernels | None = None  # of this process, if it is a fork that compiles

    def note(self) -> bool:
        """Call before forking. Returns whether forks can compile: not if this process uses no NVIDIA GPU, or if torch
        lacks something that they need."""
        if self._gpu is None and torch.cuda.is_initialized() and torch.version.cuda is not None:
            try:
                share_triton_cache()
                self._gpu, self._process = Gpu.note(), os.getpid()
            except Exception:
                logger.debug("glowplug: pieces can't be compiled in forks", exc_info=True)
        return self._gpu is not None

    def stand_in(self) -> bool:
        """Call in a process before it traces or compiles. Returns whether it is a job that is a fork of the one that
        noted its GPU; then torch answers from the notes."""
        if self._gpu is None or os.getpid() == self._process or not in_fork():
            return False
        if not self._stands_in:
            self._gpu.stand_in()
            self._stands_in = True
        return True

    def enter(self) -> bool:
        """The same in a process before it compiles: Inductor and Triton answer from the notes, too."""
        if not self.stand_in():
            return False
        if self._kernels is None:
            assert self._gpu is not None
            self._gpu.stand_in_for_compilers()
            self._kernels = _Kernels()
            self._kernels.take_over()
        return True

    def begin(self, launches: Sequence[Launch]) -> None:
        """Begin a piece, in a process that has entered.

        Args:
            launches: those of glowplug's own kernels in the piece, which are stored with it.
        """
        if self._kernels is not None:
            self._kernels.begin(launches)

    def load(self) -> bool:
        """Do what each fork would otherwise do by itself. Returns whether forks can compile."""
        try:
            if not self.note():
                return False
            self.enter()
            _load_inductor()
        except Exception:
            logger.debug("glowplug: pieces can't be compiled in forks", exc_info=True)
            return False
        return True

    def compile(self, launches: Sequence[Launch]) -> list[Job]:
        """Begin to compile kernels in forks, into Triton's cache. Whatever fails there fails again where a kernel is
        needed."""
        workers = min(len(launches), self._PROCESSES) if self._gpu is not None else 0

        def work(number: int, say: Say) -> None:
            self.enter()
            for launch in launches[number::workers]:
                with contextlib.suppress(Exception):
                    launch.compile()

        return [Job.fork(functools.partial(work, number), nice=0) for number in range(workers)]


def _load_inductor() -> None:
    """Import Inductor and do its one-off work."""
    import_inductor()
    importlib.import_module("triton.compiler.code_generator")
    from torch._inductor.codecache import CacheBase
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils._triton import has_triton, triton_hash_with_backend

    device = torch.device("cuda", torch.cuda.current_device())
    joint_graph.lazy_init(device)
    DeviceProperties.create(device)
    post_grad.lazy_init()
    has_triton()
    triton_hash_with_backend()
    CacheBase.get_system()


class _Kernels:
    """In a fork: the kernels of a piece, which are compiled at once when all are known, and not loaded."""

    _PROCESSES = 8
    """Processes that compile the kernels of one piece."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Any, str | None]] = []
        self._launches: list[Launch] = []

    def begin(self, launches: Sequence[Launch]) -> None:
        """Begin a piece with these launches of glowplug's own kernels. What waits is of one that failed."""
        self._waiting.clear()
        self._launches = list(launches)

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
        self._bundle_own()

    def _bundle_own(self) -> None:
        """Store glowplug's own kernels with the piece, and what Triton builds in C to launch them and to use the GPU:
        Triton finds all of it in its cache again."""
        from torch._inductor.runtime.runtime_utils import triton_hash_to_path_key
        from torch._inductor.triton_bundler import TritonBundler

        folders: set[str | None] = set()
        with contextlib.suppress(Exception):  # whoever needs it builds it
            folders.add(driver_folder())
        for launch in self._launches:
            with contextlib.suppress(Exception):
                kernel, launcher = launch.compile()
                folders |= {triton_hash_to_path_key(kernel), launcher}
        for folder in sorted(filter(None, folders)):
            TritonBundler.put(folder, torch.cuda.current_device())
        self._launches.clear()

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
