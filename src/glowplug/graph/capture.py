"""Capture a callable as one FX graph with Dynamo, every input described by where it comes from.

The one place that touches Dynamo's graph metadata and the symbolic shape environment (private; checked on torch 2.11
and 2.13).
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, fx, nn

from glowplug.errors import CaptureError, UnsupportedTorchError
from glowplug.forks import free_in_forks, make_lock
from glowplug.layers.handle import LayerHandle
from glowplug.layers.sources import plain_source
from glowplug.reasons import named, switched_off, why

try:
    from torch._dynamo.convert_frame import compile_lock
    from torch._dynamo.exc import RestartAnalysis
    from torch._guards import TracingContext
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental import _config as symbolic_config
except ImportError as exc:  # pragma: no cover - depends on the torch installed
    raise UnsupportedTorchError(
        f"glowplug can't find a part of torch's tracer that it needs ({exc}). It was checked on torch 2.11 and 2.13."
    ) from exc

InputKind = Literal["tensor", "symint", "handle"]
T = TypeVar("T")

tracing_lock = make_lock(awaited=True)
"""Dynamo is process-wide: one capture at a time."""
free_in_forks(compile_lock)  # Dynamo's own


@dataclass(frozen=True)
class GraphInput:
    """One input of a captured graph.

    Attributes:
        node: the placeholder's name in the graph.
        source: where its value comes from, such as `L['model']._modules['lm_head']._parameters['weight']`.
        kind: `"tensor"`, `"symint"` (a size that is symbolic) or `"handle"` (a `LayerHandle`).
        value: the object seen at capture: the very parameter, tensor or handle; None for a size.
    """

    node: str
    source: str
    kind: InputKind
    value: Any


@dataclass(frozen=True)
class Captured:
    """A captured graph. `gm`'s nodes carry `meta["example_value"]`, fake tensors with symbolic shapes."""

    gm: fx.GraphModule
    inputs: tuple[GraphInput, ...]

    @property
    def fake_mode(self) -> Any:
        """The fake tensor mode, and so the shape environment, that the graph was traced under."""
        return TracingContext.get().fake_mode


def describe(gm: fx.GraphModule) -> Captured:
    """Read off a graph that Dynamo just handed to a backend where each input comes from."""
    inputs = []
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        arg = node.meta.get("grapharg")
        if arg is None:
            raise CaptureError(
                f"graph input {node.name!r} has no source; this torch's Dynamo is not one glowplug knows"
            )
        fake = node.meta.get("example_value")
        value = arg.example
        kind: InputKind = "tensor"
        if isinstance(fake, (torch.SymInt, int)):
            kind, value = "symint", None  # asking a SymInt for its value would fix it
        elif isinstance(value, LayerHandle):
            kind = "handle"
        elif not isinstance(value, torch.Tensor):
            raise CaptureError(
                f"{named(arg.source.name)} is a {type(value).__name__}; glowplug binds tensors, sizes and layer "
                "handles. Keep other objects in the layer, where a layer op can read them."
            )
        inputs.append(GraphInput(node.name, arg.source.name, kind, value))
    return Captured(gm, tuple(inputs))


def is_restart(exc: BaseException) -> bool:
    """Whether the exception asks Dynamo to trace once more, and so must reach it."""
    return isinstance(exc, RestartAnalysis)


class _Captured(BaseException):
    """Thrown where Dynamo hands over the graph, which is all that was wanted: building guards and code around it takes
    tenths of a second. Not an `Exception`, so that nothing takes it for a backend's failure."""


class _Capture(Generic[T]):
    """Torch keeps every backend for good: once a capture is over, its own holds nothing."""

    def __init__(self, consume: Callable[[Captured], T], reads: set[str] | None) -> None:
        self.consume: Callable[[Captured], T] | None = consume
        self.reads = reads
        self.result: list[T] = []
        self.error: BaseException | None = None

    def backend(self, gm: fx.GraphModule, _example_inputs: Sequence[Any]) -> Callable[..., Any]:
        assert self.consume is not None
        if self.reads is not None:
            self.reads.update(map(_read_by, TracingContext.get().guards_context.dynamo_guards))
        try:
            self.result.append(self.consume(describe(gm)))
        except BaseException as exc:
            if is_restart(exc):
                raise
            self.error = exc
        raise _Captured

    def end(self) -> tuple[list[T], BaseException | None]:
        """Let go of everything; returns what came of it."""
        result, error = self.result, self.error
        self.consume = self.reads = self.error = None
        self.result = []
        return result, error


def _read_by(guard: Any) -> str:
    """The source of what the trace relied on; of an attribute or a key that it looked for, in vain or not, too."""
    check, name = guard.create_fn, plain_source(str(guard.name))
    details = getattr(check, "keywords", None) or {}
    what = getattr(getattr(check, "func", check), "__name__", "")
    if "attr" in details:
        return f"{name}.{details['attr']}"
    if what == "DICT_CONTAINS" and "key" in details:
        return f"{name}[{details['key']!r}]"
    return f"type({name})" if what == "TYPE_MATCH" else name


def capture(
    fn: Any,
    args: Sequence[Any],
    consume: Callable[[Captured], T],
    reads: set[str] | None = None,
) -> T:
    """Trace `fn(*args)` in one graph and hand it to `consume` while Dynamo's tracing context is alive.

    Nothing runs: the captured function is never executed. No guards are made: the caller must know that what the
    trace assumed holds (see `glowplug.graph.shapes` for sizes, `glowplug.layers.watch` for the modules).

    Args:
        fn: a plain function that takes and returns tensors; dims marked by `torch._dynamo.mark_dynamic` are symbolic.
        args: example arguments; sizes of dynamic dims must be at least 2 and differ where they may differ.
        consume: called once with the graph.
        reads: receives the source of everything in Python that the trace depends on, before `consume` is called.

    Returns:
        What `consume` returned.

    Raises:
        CaptureError: Dynamo could not trace `fn` in one graph; the message has its reason.
    """
    off = switched_off()
    if off is not None:
        raise CaptureError(off)
    job = _Capture(consume, reads)
    # Dynamo keeps what it knows by code object: a fresh one each time.
    fresh = types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    compiled = torch.compile(fresh, backend=job.backend, fullgraph=True, dynamic=False)
    with (
        tracing_lock,
        torch.inference_mode(False),
        torch.no_grad(),
        # Sizes 0 and 1 get no special treatment: what the trace assumes of a size is then always written down.
        symbolic_config.patch(backed_size_oblivious=True),  # type: ignore[attr-defined]
        torch._dynamo.config.patch(error_on_recompile=False, suppress_errors=False),
        _traces(),
    ):
        try:
            compiled(*args)
        except _Captured:
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


def _traces() -> AbstractContextManager[Any]:
    """Put the stance in force under which a function is traced; under any other it might run."""
    stance = getattr(getattr(torch._dynamo.eval_frame, "_stance", None), "stance", "default")
    return contextlib.nullcontext() if stance == "default" else torch.compiler.set_stance("default")


def traced_files() -> frozenset[str]:
    """The files of all code that was traced so far, inside a capture."""
    context: Any = TracingContext.get()
    return frozenset(code.co_filename for code in getattr(context, "traced_code", ()))


def is_fake(value: Any) -> bool:
    """Whether `value` is a stand-in for a tensor: it has a shape, a dtype and a device, and no memory."""
    return isinstance(value, FakeTensor)


def weightless(model: nn.Module) -> bool:
    """Whether a model's weights are stand-ins, so that it can be traced and not run."""
    return any(map(is_fake, model.parameters()))


@contextmanager
def in_mode_of(tensor: Tensor) -> Iterator[None]:
    """Tensors made inside are stand-ins if `tensor` is one."""
    if isinstance(tensor, FakeTensor):
        with tensor.fake_mode:
            yield
    else:
        yield


def drop_memory(model: nn.Module, device: torch.device) -> None:
    """Give a model stand-ins for its weights, as they would be on a device. Tied weights stay tied."""
    mode = FakeTensorMode()
    made: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            made[id(tensor)] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
        return made[id(tensor)]

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = stand_in(tensor)  # type: ignore[assignment]
        for name, value in module.__dict__.items():
            if isinstance(value, Tensor):
                module.__dict__[name] = stand_in(value)
