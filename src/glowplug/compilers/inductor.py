"""The Inductor piece compiler. The one place that calls `standalone_compile` (private; checked on torch 2.11, 2.13)."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from torch import fx

from glowplug.errors import UnsupportedTorchError

try:
    from torch._guards import TracingContext
    from torch._inductor import standalone_compile
    from torch._subclasses.fake_tensor import FakeTensor
except ImportError as exc:  # pragma: no cover - depends on the torch installed
    raise UnsupportedTorchError(
        f"this torch has no torch._inductor.standalone_compile ({exc}). Install torch>=2.11."
    ) from exc


class InductorCompiler:
    """Compiles a piece with Inductor, symbolic in whatever sizes the capture made symbolic.

    Args:
        options: Inductor options, as for `torch.compile(options=...)`.
    """

    name = "inductor"

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.options = dict(options or {})

    def warm_up(self, device_type: str) -> None:
        """Begin what Inductor does once a process, beside the trace: on a CPU it builds and loads small programs to
        find the instruction set, for seconds, mostly in processes of their own."""
        if device_type == "cpu":
            _probe()

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        """See `PieceCompiler.compile`."""
        if _probe.cache_info().currsize:
            _probe().join()
        with _scalars_allowed(inputs):
            artifact = standalone_compile(
                piece, list(inputs), dynamic_shapes="from_tracing_context", options=dict(self.options)
            )
        # The artifact's own __call__ adds a frame and nothing else.
        return getattr(artifact, "_compiled_fn", artifact)


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


@lru_cache(maxsize=1)
def _probe() -> threading.Thread:
    """Start the probe of the instruction set, once. Inductor keeps its result."""
    thread = threading.Thread(target=_probe_instruction_set, name="glowplug-probe", daemon=True)
    thread.start()
    return thread


def _probe_instruction_set() -> None:
    """Ask Inductor which vector instruction sets work, several at a time; a failure is found again, and reported, when
    a piece is compiled. Uses its list of them (private; checked on torch 2.11 and 2.13)."""
    try:
        from torch._inductor import cpu_vec_isa

        if platform.machine() in ("x86_64", "AMD64"):
            flags = cpu_vec_isa.x86_isa_checker()
            candidates = [
                isa for isa in cpu_vec_isa.supported_vec_isa_list if all(flag in flags for flag in str(isa).split())
            ]
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(bool, candidates))
        cpu_vec_isa.valid_vec_isa_list()
    except Exception:
        return
