"""The Inductor piece compiler. The one place that calls `standalone_compile` (private; checked on torch 2.11, 2.13)."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from glowplug.compilers.environment import describe_environment
from glowplug.compilers.kernels import noting_kernels, read_kernels, serving_kernels
from glowplug.compilers.toolchain import cpu_toolchain, toolchain_begun, why_no_cpp_compiler, why_no_folder
from glowplug.errors import UnsupportedTorchError
from glowplug.graph.capture import is_restart

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
    """Compiles a piece with Inductor, symbolic in whatever sizes the capture made symbolic.

    Args:
        options: Inductor options, as for `torch.compile(options=...)`.
    """

    name = "inductor"

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.options = dict(options or {})
        # Kernels are made for a number of threads; a fork that compiles has one, and must not count its own.
        self.threads = torch.get_num_threads()

    def problem(self, device_type: str) -> str | None:
        """Why Inductor can't compile here, in one sentence; None when nothing is known to be in the way."""
        return why_no_folder(device_type) or (why_no_cpp_compiler() if device_type == "cpu" else None)

    def warm_up(self, device_type: str) -> None:
        """Begin what Inductor does once a process, beside the trace."""
        if device_type == "cpu":
            cpu_toolchain()
        else:  # as torch.compile does: the processes that compile Triton kernels start beside the trace
            importlib.import_module("torch._inductor.async_compile").maybe_warm_pool()

    def warm_up_loading(self) -> None:
        """Import what loading a piece needs: a fifth of a second."""
        for name in _LOADING:
            importlib.import_module(name)

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        """See `PieceCompiler.compile`."""
        return _callable(self._compile_or_retry(piece, inputs))

    def environment(self, device: torch.device) -> str:
        """See `StoringCompiler.environment`."""
        return describe_environment(device, self.options, self.threads)

    def forks(self, inputs: Sequence[Sequence[Any]], *, several: bool = False) -> bool:
        """See `StoringCompiler.forks`. Not beside a GPU, and not when Inductor is told to use one process."""
        single = config.compile_threads == 1 or self.options.get("compile_threads") == 1
        if single or torch.cuda.is_initialized() or not all(map(on_cpu, inputs)):
            return False
        if (several or toolchain_begun()) and not cpu_toolchain().join():  # its thread would not be there in a fork
            return False
        if several:
            importlib.import_module("torch._inductor.compile_fx")
        return True

    def compile_to_bytes(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> bytes:
        """See `StoringCompiler.compile_to_bytes`."""
        return self.compile_and_store(piece, inputs, compile_threads=1)[1]

    def compile_and_store(
        self, piece: fx.GraphModule, inputs: Sequence[Any], **patches: Any
    ) -> tuple[Callable[..., Sequence[Any]], bytes]:
        """See `StoringCompiler.compile_and_store`."""
        with noting_kernels() as kernels:
            artifact = self._compile_or_retry(piece, inputs, aot=True, **patches)
        return _callable(artifact), pickle.dumps((artifact.serialize(), read_kernels(kernels)))

    def load(self, artifact: bytes) -> Callable[..., Sequence[Any]]:
        """See `StoringCompiler.load`."""
        inductors, kernels = pickle.loads(artifact)
        with serving_kernels(kernels):
            return _callable(AOTCompiledArtifact.deserialize(inductors))

    def _compile_or_retry(
        self, piece: fx.GraphModule, inputs: Sequence[Any], *, aot: bool = False, **patches: Any
    ) -> Any:
        try:
            return self._compile(piece, inputs, patches, aot)
        except Exception as exc:
            # Retried only if something was taken on trust, and Dynamo does not ask for another trace.
            if is_restart(exc) or not (on_cpu(inputs) and cpu_toolchain().distrust()):
                raise
        return self._compile(piece, inputs, patches, aot)

    def _compile(self, piece: fx.GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any], aot: bool) -> Any:
        patches = {"cpp.threads": self.threads, **self.options, **patches}
        if on_cpu(inputs):
            cpu_toolchain().wait()
            patches = {**cpu_toolchain().options(), **patches}
        with _scalars_allowed(inputs):
            return standalone_compile(
                piece,
                list(inputs),
                dynamic_shapes="from_tracing_context",
                options={"config_patches": patches},
                aot=aot,
            )


def _callable(artifact: Any) -> Callable[..., Sequence[Any]]:
    # The artifact's own __call__ adds frames and nothing else; one that can be stored has two of them.
    if isinstance(artifact, AOTCompiledArtifact):
        run: Callable[..., Sequence[Any]] = artifact.inner_fn.compiled_fn
        return run
    return getattr(artifact, "_compiled_fn", artifact)


def on_cpu(inputs: Sequence[Any]) -> bool:
    """Whether a piece of these inputs runs on a CPU."""
    return all(value.device.type == "cpu" for value in inputs if isinstance(value, FakeTensor))


@contextmanager
def _scalars_allowed(inputs: Sequence[Any]) -> Iterator[None]:
    """Let a piece ask a tensor for its number: Dynamo turns a Python float that changed into such a tensor."""
    context = TracingContext.try_get()
    found = [value.fake_mode for value in inputs if isinstance(value, FakeTensor)]
    found += [context.fake_mode] if context is not None and context.fake_mode is not None else []
    modes = list({id(mode): mode for mode in found}.values())
    before = [mode.allow_scalar_outputs for mode in modes]
    for mode in modes:
        mode.allow_scalar_outputs = True
    try:
        yield
    finally:
        for mode, allowed in zip(modes, before, strict=True):
            mode.allow_scalar_outputs = allowed
