"""Captures a callable as one FX graph with Dynamo, and records the source of every input.

The only module that uses Dynamo's graph metadata (private; checked on torch 2.11 and 2.13).
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from glowplug.errors import CaptureError, UnsupportedTorchError
from glowplug.graph import sources
from glowplug.layers.handle import LayerHandle
from glowplug.reasons import switched_off, why
from glowplug.runtime.forks import free_in_forks, make_lock
from glowplug.runtime.quiet import quiet

try:
    from torch._dynamo.convert_frame import compile_lock
    from torch._dynamo.exc import RestartAnalysis
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental import _config as symbolic_config
except ImportError as exc:  # pragma: no cover - depends on the torch installed
    raise UnsupportedTorchError(
        f"glowplug can't find a part of torch's tracer that it needs ({exc}). It was checked on torch 2.11 and 2.13."
    ) from exc

InputType = Literal["tensor", "symint", "handle"]
T = TypeVar("T")

tracing_lock = make_lock(awaited=True)
"""Dynamo's state is process-wide, so only one capture runs at a time."""
free_in_forks(compile_lock)  # Dynamo's own


@dataclass(frozen=True)
class GraphInput:
    """One input of a captured graph.

    Attributes:
        node: the placeholder's name in the graph.
        source: where its value comes from, such as `L['model']._modules['lm_head']._parameters['weight']`.
        type: `"tensor"`, `"symint"` (a symbolic size) or `"handle"` (an opaque value that names a layer).
        value: the parameter, tensor or handle itself, as seen at capture; None for a size.
    """

    node: str
    source: str
    type: InputType
    value: Any


@dataclass(frozen=True)
class Captured:
    """A captured graph. The nodes of `gm` carry fake tensors with symbolic shapes in `meta["example_value"]`."""

    gm: fx.GraphModule
    inputs: tuple[GraphInput, ...]

    @property
    def fake_mode(self) -> Any:
        """The fake tensor mode under which the graph was traced; it has the shape environment."""
        return TracingContext.get().fake_mode


def describe(gm: fx.GraphModule, handle: type = LayerHandle) -> Captured:
    """Read the sources of the inputs of a graph that Dynamo has just passed to a backend. `handle` is the class of the
    opaque values that name layers."""
    inputs = []
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        arg = node.meta.get("grapharg")
        if arg is None:
            raise CaptureError(
                f"graph input {node.name!r} has no source; glowplug does not support this torch's Dynamo"
            )
        fake = node.meta.get("example_value")
        value = arg.example
        input_type: InputType = "tensor"
        if isinstance(fake, (torch.SymInt, int)):
            input_type, value = "symint", None  # reading a SymInt's value would specialise it
        elif isinstance(value, handle):
            input_type = "handle"
        elif not isinstance(value, torch.Tensor):
            raise CaptureError(
                f"{sources.named(arg.source.name)} is a {type(value).__name__}; glowplug binds tensors, sizes and "
                "layer handles. Keep other objects in the layer, where a layer op can read them."
            )
        inputs.append(GraphInput(node.name, arg.source.name, input_type, value))
    return Captured(gm, tuple(inputs))


def is_restart(exc: BaseException) -> bool:
    """Whether the exception tells Dynamo to restart its trace, and so must reach Dynamo."""
    return isinstance(exc, RestartAnalysis)


class _GraphReceived(BaseException):
    """Raised once Dynamo has passed the graph to the backend, to skip building guards and bytecode, which takes tenths
    of a second. It is no `Exception`, so that nothing mistakes it for a failure of the backend."""


class _Capture(Generic[T]):
    """The backend of one capture. Torch never frees a backend, so `end` clears all references."""

    def __init__(self, consume: Callable[[Captured], T], reads: set[str] | None, handle: type) -> None:
        self.consume: Callable[[Captured], T] | None = consume
        self.reads = reads
        self.handle = handle
        self.result: list[T] = []
        self.error: BaseException | None = None

    def backend(self, gm: fx.GraphModule, _example_inputs: Sequence[Any]) -> Callable[..., Any]:
        assert self.consume is not None
        if self.reads is not None:
            self.reads.update(map(sources.read_by, TracingContext.get().guards_context.dynamo_guards))
        try:
            self.result.append(self.consume(describe(gm, self.handle)))
        except BaseException as exc:
            if is_restart(exc):
                raise
            self.error = exc
        raise _GraphReceived

    def end(self) -> tuple[list[T], BaseException | None]:
        """Clear all references and return the outcome."""
        result, error = self.result, self.error
        self.consume = self.reads = self.error = None
        self.result = []
        return result, error


def capture(
    fn: Any,
    args: Sequence[Any],
    consume: Callable[[Captured], T],
    reads: set[str] | None = None,
    *,
    handle: type = LayerHandle,
    specialise: bool = False,
) -> T:
    """Trace `fn(*args)` in one graph and pass it to `consume` while Dynamo's tracing context is active.

    The function is never executed, and no guards are built. The caller must check that the trace's assumptions hold
    (see `glowplug.graph.shapes` for sizes and `glowplug.layers.watch` for modules).

    Args:
        fn: a plain function that takes and returns tensors; dims marked by `torch._dynamo.mark_dynamic` are symbolic.
        args: example arguments. Sizes of dynamic dims must be at least 2, and differ where they may differ.
        consume: called once with the graph.
        reads: receives the source of every Python object that the trace depends on, before `consume` is called.
        handle: the class of the opaque values that name layers.
        specialise: let the trace assume that dynamic sizes are at least 2, as torch does by default.

    Returns:
        What `consume` returned.

    Raises:
        CaptureError: Dynamo could not trace `fn` in one graph; the message has Dynamo's reason.
        UnsupportedTorchError: this torch writes sources in an unknown way.
    """
    off = switched_off()
    if off is not None:
        raise CaptureError(off)
    with contextlib.suppress(CaptureError):  # if no module can be traced, the capture itself says why
        _check_names()
    return _capture(fn, args, consume, reads, handle, specialise)


@functools.cache
def _check_names() -> None:
    """Check, once per process, that this torch writes sources in the known way; else raise UnsupportedTorchError."""

    def call(model: nn.Module, x: Tensor) -> Any:
        return model(x)

    model, reads = sources.Probe(), set[str]()
    inputs = _capture(call, (model, model.example), lambda captured: captured.inputs, reads)
    model.check([entry.source for entry in inputs], reads)


def _capture(
    fn: Any,
    args: Sequence[Any],
    consume: Callable[[Captured], T],
    reads: set[str] | None,
    handle: type = LayerHandle,
    specialise: bool = False,
) -> T:
    job = _Capture(consume, reads, handle)
    # Dynamo caches by code object, so each capture gets a fresh one.
    fresh = types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    compiled = torch.compile(fresh, backend=job.backend, fullgraph=True, dynamic=False)
    with (
        tracing_lock,
        _settings(specialise),
        torch._dynamo.config.patch(error_on_recompile=False, suppress_errors=False),
    ):
        try:
            compiled(*args)
        except _GraphReceived:
            pass
        except Exception as exc:
            if job.error is None:
                raise CaptureError(why(exc)) from exc
        finally:
            result, error = job.end()
    if error is not None:
        raise error
    if not result:
        raise CaptureError("the function has no tensor computation to capture")
    return result[0]


@contextlib.contextmanager
def _settings(specialise: bool) -> Iterator[None]:
    """The switches under which a function is traced and its graph consumed."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        # Unless told otherwise, don't specialise sizes 0 and 1, so that the trace records its assumptions on sizes.
        symbolic_config.patch(backed_size_oblivious=not specialise),  # type: ignore[attr-defined]
        _default_stance(),
        quiet(),
    ):
        yield


def specialises() -> bool:
    """Whether the trace, or whatever consumes its graph now, may assume that dynamic sizes are at least 2."""
    return not symbolic_config.backed_size_oblivious


@contextlib.contextmanager
def resumed(mode: FakeTensorMode, specialise: bool) -> Iterator[Captured]:
    """In a process that did not trace: go on with a capture whose graphs were carried there, see
    `glowplug.graph.carried`. Yields it without the captured graph.

    Args:
        mode: the mode of the graphs' fake tensors.
        specialise: what `specialises` said where they were captured.
    """
    with _settings(specialise), tracing(TracingContext(mode)):
        yield Captured(fx.GraphModule(nn.Module(), fx.Graph()), ())


@contextlib.contextmanager
def outside_trace() -> Iterator[None]:
    """While a capture is consumed, run a model as anywhere else: torch 2.13 says until then that it is compiling, to
    which transformers listens. Sets `torch.compiler._is_compiling_flag` (private; checked on torch 2.11 and 2.13)."""
    compiler: Any = torch.compiler
    before = getattr(compiler, "_is_compiling_flag", None)
    if before is None:  # whoever runs a model must ask `torch.compiler.is_compiling`
        yield
        return
    compiler._is_compiling_flag = False
    try:
        yield
    finally:
        compiler._is_compiling_flag = before


def _default_stance() -> AbstractContextManager[Any]:
    """Set the compiler stance that traces the function; under another stance it might run."""
    stance = getattr(getattr(torch._dynamo.eval_frame, "_stance", None), "stance", "default")
    return contextlib.nullcontext() if stance == "default" else torch.compiler.set_stance("default")


def traced_files() -> frozenset[str]:
    """The files of all code that the current capture has traced so far."""
    context: Any = TracingContext.get()
    return frozenset(code.co_filename for code in getattr(context, "traced_code", ()))


def is_fake(value: Any) -> bool:
    """Whether `value` is a fake tensor: it has a shape, a dtype and a device, but no memory."""
    return isinstance(value, FakeTensor)


def weightless(model: nn.Module) -> bool:
    """Whether a model's weights are fake tensors, so that it can be traced but not run."""
    return any(map(is_fake, model.parameters()))


@contextmanager
def in_mode_of(tensor: Tensor) -> Iterator[None]:
    """Make tensors created in this context fake if `tensor` is fake."""
    if isinstance(tensor, FakeTensor):
        with tensor.fake_mode:
            yield
    else:
        yield


class TensorsWithoutMemory(TorchFunctionMode):
    """In a fake mode, let `torch.tensor` make fake tensors on a GPU. By itself it would first make a real one there."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is torch.tensor and device is not None:
            made = func(*args, **{**kwargs, "device": "cpu"})
            return torch.empty(made.shape, dtype=made.dtype, device=device)
        return func(*args, **kwargs)


def drop_memory(model: nn.Module, device: torch.device) -> None:
    """Replace a model's weights by fake tensors on a device. Tied weights stay tied."""
    mode = FakeTensorMode()
    fakes: dict[int, Tensor] = {}

    def fake_of(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            with mode:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            fakes[id(tensor)] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
        return fakes[id(tensor)]

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = fake_of(tensor)  # type: ignore[assignment]
        for name, value in module.__dict__.items():
            if isinstance(value, Tensor):
                module.__dict__[name] = fake_of(value)
