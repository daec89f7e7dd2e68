"""The Inductor piece compiler, the only caller of `standalone_compile` (private; checked on torch 2.11 and 2.13)."""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from glowplug.background.helper import Helper
from glowplug.background.job import Job
from glowplug.compilers.environment import describe_environment
from glowplug.compilers.gpu.forks import GpuForks
from glowplug.compilers.gpu.linears import merge_linears
from glowplug.compilers.gpu.own_kernels import launches_of
from glowplug.compilers.gpu.warm import open_driver, share_triton_cache
from glowplug.compilers.kernels import loading_kernels, noting_kernels, read_kernels
from glowplug.compilers.light import lighten, loading_lightly, read_torch_key
from glowplug.compilers.toolchain import cpu_toolchain, toolchain_begun, why_no_cpp_compiler, why_no_folder
from glowplug.errors import UnsupportedTorchError
from glowplug.graph.capture import is_restart
from glowplug.runtime.quiet import quiet
from glowplug.runtime.triton_key import TRITON_KEY

try:
    from torch._guards import TracingContext
    from torch._inductor import config, standalone_compile
    from torch._inductor.standalone_compile import AOTCompiledArtifact
    from torch._subclasses.fake_tensor import FakeTensor
except ImportError as exc:  # pragma: no cover - depends on the torch installed
    raise UnsupportedTorchError(
        f"this torch has no torch._inductor.standalone_compile ({exc}). Install torch>=2.11."
    ) from exc

_LOADING = (
    "torch._inductor.async_compile",
    "torch._inductor.output_code",
    "torch._functorch._aot_autograd.aot_autograd_result",
)


class InductorCompiler:
    """Compiles a piece with Inductor; sizes that are symbolic in the capture stay symbolic.

    Args:
        options: Inductor options, as for `torch.compile(options=...)`.
        merges: on NVIDIA GPUs, whether linear layers of half precision become `glowplug::linears`.
    """

    name = "inductor"

    def __init__(self, options: Mapping[str, Any] | None = None, *, merges: bool = True) -> None:
        self.options = dict(options or {})
        self.merges = merges and torch.version.cuda is not None
        # Kernels are compiled for a number of threads. Read it here, as a fork that compiles has only one.
        self.threads = torch.get_num_threads()
        self._gpu_forks = GpuForks()
        self._helper: Helper | None = None

    def problem(self, device_type: str) -> str | None:
        """Why Inductor can't compile here, in one sentence; None if there is no known obstacle."""
        return why_no_folder(device_type) or (why_no_cpp_compiler() if device_type == "cpu" else None)

    def warm_up(self, device_type: str) -> None:
        """Start Inductor's one-off work, which then runs during the trace."""
        if device_type == "cpu":
            cpu_toolchain()
        elif self._forks_for_gpu and self._gpu_forks.note():
            # In threads of this process the imports and the trace would wait for each other.
            self._helper = Helper(self._load)
            if not self._gpu_forks.stand_in():
                open_driver(torch.cuda.current_device())
        else:  # as torch.compile does: start the processes that compile Triton kernels
            with quiet():
                importlib.import_module("torch._inductor.async_compile").maybe_warm_pool()

    def _load(self) -> InductorCompiler:
        """In a helper: get ready to compile."""
        self._gpu_forks.load()
        return self

    def may_bake(self, device: torch.device) -> bool:
        """Call before forking. Returns whether a fork may trace and compile for a GPU that this process uses: not if it
        is none of NVIDIA's, or if torch lacks something that forks need."""
        if not self._forks_for_gpu or device.type != "cuda" or not torch.cuda.is_available():
            return False
        torch.cuda.init()
        with torch.cuda.device(device):
            return self._gpu_forks.note()

    def stand_in(self) -> None:
        """In such a fork: let torch answer without the GPU."""
        self._gpu_forks.stand_in()

    def cool_down(self) -> None:
        """End what `warm_up` started and nothing needs any more."""
        if self._helper is not None:
            self._helper.stop()
            self._helper = None

    def warm_up_loading(self) -> None:
        """Import the modules that loading a piece needs, which takes a fifth of a second."""
        with quiet():
            for name in _LOADING:
                importlib.import_module(name)

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        """See `PieceCompiler.compile`."""
        return _callable(self._compile_or_retry(piece, inputs))

    def environment(self, device: torch.device) -> str:
        """See `StoringCompiler.environment`."""
        return describe_environment(device, {**self.options, "glowplug.merges": self.merges}, self.threads)

    def forks(self, inputs: Sequence[Sequence[Any]], *, several: bool = False) -> bool:
        """See `StoringCompiler.forks`. No forks if Inductor is limited to one process. Pieces for a GPU are compiled in
        forks that this process waits for, and pieces for a CPU only if this process uses no GPU."""
        if several and self._forks_for_gpu and all(map(_on_gpu, inputs)):
            return self._gpu_forks.load()
        if not self.may_defer(inputs):
            return False
        if (several or toolchain_begun()) and not cpu_toolchain().join():  # its thread does not exist in a fork
            return False
        if several:
            with quiet():
                importlib.import_module("torch._inductor.compile_fx")
        return True

    def beside_forks(self, pieces: Sequence[fx.GraphModule]) -> list[Job]:
        """See `PieceCompiler`: more forks compile the kernels of glowplug's own ops, which no piece contains."""
        merged = [merge_linears(piece) if self.merges else piece for piece in pieces]
        return self._gpu_forks.compile(launches_of(merged))

    @property
    def can_hand_over(self) -> bool:
        """See `PieceCompiler`."""
        return self._helper is not None and self._helper.waits

    def hand_over(self, work: Callable[..., None], *arguments: Any) -> Job | None:
        """See `PieceCompiler`: to a process that imported Inductor while this one traced."""
        return self._helper.hand_over(work, *arguments) if self._helper is not None else None

    def may_defer(self, inputs: Sequence[Sequence[Any]]) -> bool:
        """See `PieceCompiler`: of a process that uses a GPU no fork compiles beside serving."""
        return self._may_fork and not torch.cuda.is_initialized() and all(map(on_cpu, inputs))

    @property
    def _may_fork(self) -> bool:
        """Whether pieces may be compiled in forks, as far as the platform and the options decide it."""
        limit = self.options.get("compile_threads", config.compile_threads)
        return sys.platform == "linux" and limit != 1

    @property
    def _forks_for_gpu(self) -> bool:
        """Whether forks may compile pieces for a GPU; only for those of NVIDIA."""
        return self._may_fork and torch.version.cuda is not None

    def compile_to_bytes(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> bytes:
        """See `StoringCompiler.compile_to_bytes`."""
        return self.compile_and_store(piece, inputs, compile_threads=1)[1]

    def compile_and_store(
        self, piece: fx.GraphModule, inputs: Sequence[Any], **patches: Any
    ) -> tuple[Callable[..., Sequence[Any]], bytes]:
        """See `StoringCompiler.compile_and_store`."""
        with noting_kernels() as kernels:
            artifact = self._compile_or_retry(piece, inputs, aot=True, **patches)
        keys = read_torch_key(), TRITON_KEY.read() if _on_gpu(inputs) else None
        return _callable(artifact), pickle.dumps((lighten(artifact.serialize()), read_kernels(kernels), *keys))

    def load(self, artifact: bytes) -> Callable[..., Sequence[Any]]:
        """See `StoringCompiler.load`."""
        if self._gpu_forks.stand_in():
            return _only_stored
        inductor_artifact, kernels, torch_key, triton_key = pickle.loads(artifact)
        for_gpu = triton_key is not None and self._forks_for_gpu and torch.cuda.is_initialized()
        if for_gpu:
            share_triton_cache()
            TRITON_KEY.learn(triton_key)
        with quiet(), loading_lightly(torch_key), loading_kernels(kernels):
            run = _callable(AOTCompiledArtifact.deserialize(inductor_artifact))
        if for_gpu:
            open_driver(torch.cuda.current_device())  # the piece has brought its helper
        return run

    def _compile_or_retry(
        self, piece: fx.GraphModule, inputs: Sequence[Any], *, aot: bool = False, **patches: Any
    ) -> Any:
        try:
            return self._compile(piece, inputs, patches, aot)
        except Exception as exc:
            # Retry only if an unverified instruction set may be the cause, and this is not Dynamo's request to restart.
            if is_restart(exc) or not (on_cpu(inputs) and cpu_toolchain().distrust()):
                raise
        return self._compile(piece, inputs, patches, aot)

    def _compile(self, piece: fx.GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any], aot: bool) -> Any:
        if self.merges and _on_gpu(inputs):
            piece = merge_linears(piece)
        if _on_gpu(inputs) and self._forks_for_gpu:  # instead of processes of Inductor's, which start for seconds
            patches = {"compile_threads": 1, **patches}
        if self._gpu_forks.enter():
            self._gpu_forks.begin(launches_of([piece]))
            # It can't run kernels: they are tuned when they first run, and no product is tried with padded matrices.
            patches = {"triton.autotune_at_compile_time": False, "shape_padding": False, **patches}
        patches = {"cpp.threads": self.threads, **self.options, **patches}
        if on_cpu(inputs):
            cpu_toolchain().wait()
            patches = {**cpu_toolchain().options(), **patches}
        with quiet(), _scalars_allowed(inputs):
            return standalone_compile(
                piece,
                list(inputs),
                dynamic_shapes="from_tracing_context",
                options={"config_patches": patches},
                aot=aot,
            )


def _callable(artifact: Any) -> Callable[..., Sequence[Any]]:
    # Skip the artifact's own __call__, which only adds frames: two if the artifact is storable.
    if isinstance(artifact, AOTCompiledArtifact):
        run: Callable[..., Sequence[Any]] = artifact.inner_fn.compiled_fn
        return run
    return getattr(artifact, "_compiled_fn", artifact)


def _only_stored(*inputs: Any) -> Sequence[Any]:
    """Stands for a piece in a process that can't run it."""
    raise RuntimeError("a fork of a process that uses a GPU can't run what it compiles")


def on_cpu(inputs: Sequence[Any]) -> bool:
    """Whether a piece with these inputs runs on the CPU."""
    return all(value.device.type == "cpu" for value in inputs if isinstance(value, FakeTensor))


def _on_gpu(inputs: Sequence[Any]) -> bool:
    """Whether a piece with these inputs runs on an NVIDIA or AMD GPU."""
    devices = {value.device.type for value in inputs if isinstance(value, FakeTensor)}
    return devices == {"cuda"}


@contextmanager
def _scalars_allowed(inputs: Sequence[Any]) -> Iterator[None]:
    """Allow pieces to call `item()` on a tensor: Dynamo replaces a Python float that changes with such a tensor."""
    context = TracingContext.try_get()
    all_modes = [value.fake_mode for value in inputs if isinstance(value, FakeTensor)]
    all_modes += [context.fake_mode] if context is not None and context.fake_mode is not None else []
    modes = list({id(mode): mode for mode in all_modes}.values())
    before = [mode.allow_scalar_outputs for mode in modes]
    for mode in modes:
        mode.allow_scalar_outputs = True
    try:
        yield
    finally:
        for mode, allowed in zip(modes, before, strict=True):
            mode.allow_scalar_outputs = allowed
