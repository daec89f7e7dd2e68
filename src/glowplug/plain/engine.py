"""The engine of a plain `nn.Module`: registers its layers, stamps its forward where it repeats itself, and otherwise
compiles it through the glowplug backend, which traces every layer.
"""

from __future__ import annotations

import copy
import functools
import itertools
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from glowplug.backend import glowplug_backend
from glowplug.compilers import get_compiler, why_unable
from glowplug.errors import GlowplugError, NotServableError
from glowplug.forks import make_lock
from glowplug.layers.context import ForwardContext, forward_context
from glowplug.layers.fitness import unfit
from glowplug.layers.registry import LayerRegistry, register_layers
from glowplug.ops import order_layers
from glowplug.options import Options
from glowplug.plain.stamped import Stamper
from glowplug.reasons import is_tracers, switched_off, told, why
from glowplug.report import Report

try:
    from torch._dynamo.exc import TorchDynamoException
    from torch._dynamo.utils import counters as _dynamo_counters
    from torch._dynamo.utils import graph_break_reasons as _breaks
except ImportError:  # pragma: no cover - private; checked on torch 2.11 and 2.13. Without it, breaks go unreported.
    TorchDynamoException = ()
    _dynamo_counters, _breaks = {}, []


_entries = itertools.count()
_OWN_FORWARD = (
    "can't stamp the layers: before it was compiled the module was given a forward of its own, which is traced as it "
    "is; compile the module first, then wrap module.forward"
)
_CHANGES = 4
"""How often a module may change and be stamped anew."""


class ModuleEngine:
    """Stands in for a module's forward. Made by `glowplug.compile` for modules that transformers can't generate with.

    A stamped module is watched, and stamped anew once it changed; when it has changed back, its program serves again.
    In a full trace Dynamo's guards stay in force.

    Args:
        model: any module whose forward takes and returns tensors.
        options: how to compile it; `experts` has no meaning here.
        own: the forward that somebody put on the module before it was compiled. It is traced in full: what is bound to
            this very module can't be stamped.
    """

    def __init__(self, model: nn.Module, options: Options, own: Callable[..., Any] | None = None) -> None:
        functools.update_wrapper(self, type(model).forward, updated=())
        self.model = model
        self.options = options
        self.own = own
        self.report = Report()
        self.check_order = True
        self.registry: LayerRegistry | None = None
        self._compiled: Any = None
        self._unfit: str | None = None
        self._stampers: list[Stamper] = []
        self._lock = make_lock()

    def _start(self) -> None:
        """Register the layers, at the first call: a copy is made, or unpickled, before its submodules are."""
        self.registry = registry = register_layers(self.model, identity=self.options.resolved_identity)
        order_layers(registry)
        compiler = get_compiler(self.options.compiler)
        self.report.compiler = compiler.name
        device = next((parameter.device.type for parameter in self.model.parameters()), "cpu")
        self._unfit = unfit(self.model) or why_unable(compiler, device)
        if self._unfit is not None:
            return
        settings: dict[str, Any] = {
            "compiler": self.options.compiler,
            "report": self.report,
            "strict": self.options.strict,
        }
        self._compiled = torch.compile(
            _entry(self.model, self.own),
            backend=glowplug_backend,
            options=settings,
            fullgraph=self.options.strict,
        )
        if self.own is not None:
            if self.options.strict:
                raise NotServableError(f"{_OWN_FORWARD} (strict=True: no step down)")
            self.report.fall_back(_OWN_FORWARD, to="hoisted")
        elif not self.model.training:
            self._stampers.append(Stamper(self.model, registry, self.options, compiler, self.report))

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleEngine:
        model = memo.get(id(self.model))
        if model is None:
            raise NotServableError("a compiled forward can't be copied without its model; copy the model")
        return ModuleEngine(model, self.options, copy.deepcopy(self.own, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return ModuleEngine, (self.model, self.options, self.own)

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, compiled."""
        off = switched_off()
        if off is not None:
            return self._eager(off, args, kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*self.model.parameters(), *tensors)):
            return self._eager(
                "grad mode is on and the module's weights need gradients; run under torch.no_grad()", args, kwargs
            )
        with self._lock:
            if self.registry is None:
                self._start()
        if self._unfit is not None:
            return self._eager(self._unfit, args, kwargs)
        self.report.serving = "program"
        stamper = self._current()
        run = stamper.find(args, kwargs) if stamper is not None else None
        return run() if run is not None else self._traced(args, kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward as it was before it was compiled."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)

    def _current(self) -> Stamper | None:
        """The stamper of the module as it is now; None where it is to be traced in full."""
        with self._lock:
            if self.own is not None or self.model.training:
                return None
            for stamper in reversed(self._stampers):
                changed = stamper.changed
                if changed is None:
                    return stamper
            if len(self._stampers) <= _CHANGES:
                self._start()
                return self._stampers[-1]
            self.report.fall_back(f"the module was changed {len(self._stampers)} times: {changed}", to="hoisted")
            return None

    def settle(self, timeout_s: float) -> None:
        """Wait for what is compiled beside serving, and put it to use."""
        for stamper in self._stampers:
            stamper.poll(time.monotonic() + timeout_s)

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward, traced in full."""
        registry = self.registry
        assert registry is not None
        breaks, places = dict(_dynamo_counters.get("graph_break", {})), len(_breaks)
        programs = self.report.programs
        with _guard_hooks(), forward_context(ForwardContext(registry, None, self.check_order)):
            try:
                output = self._compiled(*args, **kwargs)
            except Exception as exc:
                cause = _glowplug_cause(exc)
                if cause is not None:
                    raise cause from exc
                if not (isinstance(exc, TorchDynamoException) or is_tracers(exc)):
                    raise
                return self._eager(why(exc), args, kwargs)
        if self.report.programs != programs and self.report.strategy != "stamped":
            self.report.strategy = self.options.resolved_identity
        found = [r for r, n in _dynamo_counters.get("graph_break", {}).items() if n > breaks.get(r, 0)]
        if found or self.report.programs > programs + 1:
            at = _breaks[places] if len(_breaks) > places else None
            reason = told(at.reason, at.user_stack) if at is not None else told(found[0]) if found else ""
            reason = f": {reason}" if reason else ""
            self.report.fall_back(f"Dynamo broke the graph, and ran the rest eager or apart{reason}")
        return output

    def _eager(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.options.strict:
            raise NotServableError(f"{reason} (strict=True: nothing runs eager)")
        self.report.fall_back(reason)
        self.report.serving = f"eager: {reason}"
        return self._forward(*args, **kwargs)


def _guard_hooks() -> Any:
    """Make Dynamo notice hooks that are added to a module later; by default it does not look."""
    return torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)


def _entry(model: nn.Module, own: Callable[..., Any] | None) -> types.FunctionType:
    """A function that runs the module's own forward, with a code object and a name of its own: Dynamo counts
    recompilations by code object, and remembers by name which sizes varied; other modules' must not count here."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs) if own is not None else type(model).forward(model, *args, **kwargs)

    code = run.__code__.replace(co_name=f"run_{next(_entries)}")
    return types.FunctionType(code, run.__globals__, run.__name__, None, run.__closure__)


def _glowplug_cause(exc: BaseException | None) -> GlowplugError | None:
    """An error of glowplug's own that Dynamo wrapped."""
    while exc is not None:
        if isinstance(exc, GlowplugError):
            return exc
        exc = getattr(exc, "inner_exception", None) or exc.__cause__
    return None


def attach_module(model: nn.Module, options: Options) -> None:
    """Put an engine in the place of the module's forward."""
    own = model.__dict__.pop("forward", None)
    engine = ModuleEngine(model, options, own.own if isinstance(own, ModuleEngine) else own)
    object.__setattr__(model, "forward", engine)
