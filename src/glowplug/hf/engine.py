"""The engine of one transformers model: reads each call, builds a program where one is missing, runs it, or falls back
to the model's own forward with a recorded reason.
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from glowplug.compilers import get_compiler
from glowplug.compilers.base import StoringCompiler
from glowplug.errors import GlowplugError, LayerOrderError, NotServableError
from glowplug.hf.background import can_fork
from glowplug.hf.build import Builder
from glowplug.hf.caches import has_begun
from glowplug.hf.call import Call, Signature, read_call
from glowplug.hf.elsewhere import Background, rebuild, with_store
from glowplug.hf.served import Served
from glowplug.layers.registry import LayerRegistry
from glowplug.layers.watch import Watch
from glowplug.options import Options
from glowplug.report import ElsewhereReport, Report
from glowplug.store import open_store

_SAME_EXPERTS = (None, "eager", "grouped_mm", "batched_mm")


class Engine:
    """Stands in for `model.forward`. Made by `glowplug.compile`.

    Args:
        model: a decoder-only causal language model, in eval mode.
        options: how to compile it.
    """

    def __init__(self, model: PreTrainedModel, options: Options) -> None:
        functools.update_wrapper(self, type(model).forward, updated=())
        self.__signature__ = inspect.signature(type(model).forward.__get__(model))
        self.model = model
        self.options = options
        compiler = get_compiler(options.compiler)
        self.report = Report(compiler=compiler.name)
        self.keeps: Any = None
        """What lives as long as the engine, such as a store of this process alone."""
        self._met: set[Signature] = set()
        self._background: Background | None = None
        if options.background:
            options, self.keeps = with_store(options)
            self._background = Background(model, options, self.report)
        store = open_store(options.cache_dir) if isinstance(compiler, StoringCompiler) else None
        self._make_builder = functools.partial(Builder, model, self.options, compiler, self.report, store)
        self._rebuild = functools.partial(rebuild, model, options)
        self._builder: Builder | None = None
        self._lock = threading.RLock()
        self._served: dict[Signature, Served | str] = {}
        self._watch: Watch | None = None
        self._implementations: tuple[Any, ...] = ()
        self._stale: str | None = None

    @property
    def builder(self) -> Builder:
        """Made when first asked for: it reads the model, which is not whole yet while a copy's engine is made."""
        if self._builder is None:
            with self._lock:
                self._builder = self._builder or self._make_builder()
                if can_fork(next(self.model.parameters()).device):
                    self._builder.rebuild = self._rebuild
                if self._background is not None and self._builder.distributed:
                    self._background = None
                    self.report.elsewhere = ElsewhereReport(0.0, reason="the model is distributed over processes")
        return self._builder

    @property
    def registry(self) -> LayerRegistry | None:
        """The model's layers, once it was captured."""
        return self.builder.registry

    @property
    def check_order(self) -> bool:
        """With `identity="ordered"`, whether a wrong order raises. Only a demonstration turns it off."""
        return self.builder.prover.check_order

    @check_order.setter
    def check_order(self, check: bool) -> None:
        self.builder.prover.check_order = check

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        model = memo.get(id(self.model))
        if model is None:
            raise NotServableError("a compiled forward can't be copied without its model; copy the model")
        return Engine(model, self.options)

    def __reduce__(self) -> tuple[Any, ...]:
        return Engine, (self.model, self.options)

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, by the program where it can serve."""
        reason = self._unfit(kwargs.get("inputs_embeds"))
        call = read_call(self.model, args, kwargs) if reason is None else reason
        if isinstance(call, str):
            return self._eager(call, args, kwargs)
        served = self._served.get(call.signature)
        if served is None and self._background is not None and call.signature not in self._met:
            self._met.add(call.signature)  # nothing at all is done before the first answer
            return type(self.model).forward(self.model, *args, **kwargs)
        builder = self.builder
        if served is None and self._background is not None:
            served = self._take_over(call, self._background)
            if served is None:
                output = type(self.model).forward(self.model, *args, **kwargs)
                self._background.start(call)
                return output
        elif served is None:
            served = self._build(call)
        elif builder.pending and not _begun(call):
            builder.poll()
        if isinstance(served, str):
            return self._eager(served, args, kwargs)
        broken = served.broken_by(call)
        if broken is not None:
            return self._eager(broken, args, kwargs)
        assert self.registry is not None
        return served.run(call, self.registry, check_order=self.check_order)

    def _eager(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.options.strict:
            raise NotServableError(f"{reason} (strict=True: nothing runs eager)")
        self.report.fall_back(reason)
        return type(self.model).forward(self.model, *args, **kwargs)

    def _take_over(self, call: Call, background: Background) -> Served | str | None:
        """The program that was built elsewhere; None while there is none, and eager is to serve."""
        with self._lock:
            found = self._served.get(call.signature)
            if found is not None:
                return found
            outcome = background.outcome(call)
            if outcome is None and call.signature in background.begun:
                return None
            if outcome is not None and outcome.reason is not None:
                found = f"the build in another process came to nothing: {outcome.reason}"
            else:
                found = self.builder.find_stored(call)
                if found is None and outcome is not None:
                    problems = self.builder.store.problems if self.builder.store is not None else []
                    found = f"what another process built can't be used: {problems[-1] if problems else 'it is gone'}"
            if found is not None:
                self._keep(call.signature, found)
            return found

    def settle(self, timeout_s: float) -> None:
        """Wait for what is compiled beside serving, and put it to use."""
        if self._background is not None:
            self._background.wait(time.monotonic() + timeout_s)
        self.builder.poll(time.monotonic() + timeout_s)

    def prepare(self) -> Report:
        """Make the program for token ids now, as the first call of `generate` would."""
        ids = torch.zeros(1, 2, dtype=torch.long, device=next(self.model.parameters()).device)
        prepare: Any = getattr(self.model, "_prepare_position_ids_for_generation", None)
        positions = prepare(ids, {}) if prepare is not None else torch.arange(2, device=ids.device).unsqueeze(0)
        call = read_call(self.model, (), {"input_ids": ids, "position_ids": positions, "use_cache": True})
        if isinstance(call, str):
            self.report.fall_back(call)
            return self.report
        found = self._build(call)
        if isinstance(found, str):
            self.report.fall_back(found)
        return self.report

    # -- what can't be served ---------------------------------------------------------------------------------

    def _unfit(self, embeds: Any = None) -> str | None:
        """Why no call can be served now, or None."""
        model = self.model
        if model.training:
            return "the model is in training mode; call model.eval()"
        if torch.is_grad_enabled() and (self._needs_grad() or getattr(embeds, "requires_grad", False)):
            return "grad mode is on and the model's weights or inputs need gradients; run under torch.no_grad()"
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return "autocast is on; load the model in the dtype that it is to run in"
        if self._watch is not None:
            changed = self._changed()
            if changed is not None:
                return changed
        return self._stale

    def _needs_grad(self) -> bool:
        return any(parameter.requires_grad for parameter in self.model.parameters())

    def _changed(self) -> str | None:
        assert self._watch is not None
        if self._read_implementations() != self._implementations:
            what = "the attention or experts implementation was changed after compiling"
            self._stale = f"{what}; call glowplug.compile(model) again"
        elif self._stale is None:
            reason = self._watch.change()
            if reason is not None:
                self._stale = f"the model was changed after compiling: {reason}; call glowplug.compile(model) again"
        return self._stale

    def _read_implementations(self) -> tuple[Any, ...]:
        config = self.model.config.get_text_config()
        experts = getattr(config, "_experts_implementation", None)
        # generate() itself switches between these on a GPU; they compute the same.
        return config._attn_implementation, None if experts in _SAME_EXPERTS else experts

    # -- building ---------------------------------------------------------------------------------------------

    def _build(self, call: Call) -> Served | str:
        with self._lock:
            found = self._served.get(call.signature)
            if found is None:
                try:
                    found = self.builder.build(call)
                except (LayerOrderError, NotServableError):
                    raise
                except GlowplugError as exc:
                    found = str(exc)
                self._keep(call.signature, found)
            return found

    def _keep(self, signature: Signature, found: Served | str) -> None:
        self._served[signature] = found
        if isinstance(found, str):
            self.report.strategy = "eager"
        self._watch = self.builder.prover.watch
        self._implementations = self._read_implementations()


def _begun(call: Call) -> bool:
    """Whether the call goes on with a sequence."""
    return has_begun(call.cache)


def attach(model: PreTrainedModel, options: Options) -> None:
    """Put an engine in the place of the model's forward."""
    model.__dict__.pop("forward", None)
    engine = Engine(model, options)
    object.__setattr__(model, "forward", engine)


def engine_of(model: nn.Module) -> Engine | None:
    """The model's engine, or None."""
    found = model.__dict__.get("forward")
    return found if isinstance(found, Engine) else None
