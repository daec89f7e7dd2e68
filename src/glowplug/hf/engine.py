"""The engine of one transformers model: reads each call, builds a program where one is missing, runs it, or falls back
to the model's own forward with a recorded reason.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from glowplug.compilers import get_compiler
from glowplug.compilers.base import StoringCompiler
from glowplug.errors import LayerOrderError, NotServableError
from glowplug.forks import make_lock
from glowplug.hf.background import Background, why_unused, with_store
from glowplug.hf.build import Builder
from glowplug.hf.caches import has_begun
from glowplug.hf.call import Call, Signature, first_call, read_call
from glowplug.hf.rotary_entry import rotary_layers
from glowplug.hf.served import Served
from glowplug.layers.fitness import unfit
from glowplug.layers.registry import LayerRegistry
from glowplug.layers.watch import Watch
from glowplug.options import Options
from glowplug.reasons import switched_off, why
from glowplug.report import ElsewhereReport, Report
from glowplug.store import open_store

logger = logging.getLogger("glowplug")

_REFUSALS = 4
"""How often a program for calls of one signature is tried to be made, if the model has changed each time."""
_SAME_EXPERTS = (None, "eager", "grouped_mm", "batched_mm")


@dataclass(frozen=True)
class Refusal:
    """Why there is no program for calls of a signature.

    Attributes:
        reason: in words.
        watch: finds changes of the model since; None where they make no difference.
    """

    reason: str
    watch: Watch | None


class Engine:
    """Stands in for `model.forward`. Made by `glowplug.compile`.

    Args:
        model: a decoder-only causal language model, in eval mode.
        options: how to compile it.
        own: the forward that somebody put on the model before it was compiled. It runs as it is; no program does what
            it does.
    """

    def __init__(self, model: PreTrainedModel, options: Options, own: Callable[..., Any] | None = None) -> None:
        functools.update_wrapper(self, type(model).forward, updated=())
        self.__signature__ = inspect.signature(own or type(model).forward.__get__(model))
        self.model = model
        self.options = options
        self.own = own
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
        self._builder: Builder | None = None
        self._lock = make_lock()
        self._served: dict[Signature, Served | Refusal] = {}
        self._refusals: Counter[Signature] = Counter()
        self._watch: Watch | None = None
        self._implementations: tuple[Any, ...] = ()

    @property
    def builder(self) -> Builder:
        """Made when first asked for: it reads the model, which is not whole yet while a copy's engine is made."""
        if self._builder is None:
            with self._lock:
                self._builder = self._builder or self._make_builder()
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
        return Engine(model, self.options, copy.deepcopy(self.own, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Engine, (self.model, self.options, self.own)

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, by the program where it can serve."""
        reason = self._unfit(kwargs.get("inputs_embeds"))
        call = read_call(self.model, args, kwargs) if reason is None else reason
        if isinstance(call, str):
            return self._eager(call, args, kwargs)
        served = self._known(call.signature)
        known = served is not None
        if served is None and self._background is not None and call.signature not in self._met:
            self._met.add(call.signature)  # nothing at all is done before the first answer
            return self._meanwhile(args, kwargs)
        builder = self.builder
        if served is None and self._background is not None:
            served = self._take_over(call, self._background)
            if served is None:
                output = self._meanwhile(args, kwargs)
                self._background.start(call)
                return output
        elif served is None:
            served = self._build(call)
        if isinstance(served, Refusal):
            return self._eager(served.reason, args, kwargs)
        broken = served.broken_by(call)
        if broken is not None:
            return self._eager(broken, args, kwargs)
        running = served.sequences.of(call.cache) if _begun(call) else None
        if running is None:
            if known:
                self._poll()
            running = served.begin(call.cache, builder.in_use)
        self.report.serving = "program"
        return served.run(
            call,
            builder.layers,
            program=running.program,
            insides=running.insides.unchanged(self.report),
            check_order=self.check_order,
        )

    def _eager(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.options.strict:
            raise NotServableError(f"{reason} (strict=True: nothing runs eager)")
        self.report.fall_back(reason)
        self.report.serving = f"eager: {reason}"
        return self._forward(*args, **kwargs)

    def _meanwhile(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.report.serving = "eager: the program is being built in another process"
        return self._forward(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward as it was before it was compiled."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)

    def _poll(self) -> None:
        """Put to use what was compiled beside serving. Whatever comes of it, the call goes on."""
        if self.builder.pending:
            try:
                self.builder.poll()
            except Exception:
                logger.exception("glowplug: what was compiled beside serving can't be taken")

    def _known(self, signature: Signature) -> Served | Refusal | None:
        """What is known of calls of a signature. A refusal holds while the model is what it was: a hook that can't be
        traced may only be there for a while."""
        known = self._served.get(signature)
        if isinstance(known, Refusal) and known.watch is not None and self._refusals[signature] < _REFUSALS:
            return known if known.watch.change() is None else None
        return known

    def _take_over(self, call: Call, background: Background) -> Served | Refusal | None:
        """The program that was built elsewhere; None while there is none, and eager is to serve."""
        with self._lock:
            known = self._served.get(call.signature)
            if known is not None:
                return known
            found: Served | str | None
            outcome = background.outcome(call)
            if outcome is None and call.signature in background.begun:
                return None
            if outcome is not None and outcome.reason is not None:
                found = f"the build in another process came to nothing: {outcome.reason}"
            else:
                found = self.builder.find_stored(call)
                if found is None and outcome is not None:
                    found = f"what another process built can't be used: {why_unused(outcome, self.builder)}"
            return self._keep(call.signature, found) if found is not None else None

    def settle(self, timeout_s: float) -> None:
        """Wait for what is compiled beside serving, and put it to use."""
        if self._background is not None:
            self._background.wait(time.monotonic() + timeout_s)
        self.builder.poll(time.monotonic() + timeout_s)

    def prepare(self) -> Report:
        """Make the program for token ids now, as the first call of `generate` would."""
        call = first_call(self.model)
        if isinstance(call, str):
            self.report.fall_back(call)
            return self.report
        found = self._build(call)
        if isinstance(found, Refusal):
            self.report.fall_back(found.reason)
        return self.report

    # -- what can't be served ---------------------------------------------------------------------------------

    def _unfit(self, embeds: Any = None) -> str | None:
        """Why no call can be served now, or None."""
        off = switched_off()
        if off is not None:
            return off
        model = self.model
        if self.own is not None:
            return unfit(model) or (
                f"before it was compiled the model was given a forward of its own ({_name(self.own)}), which runs as "
                "it is; compile the model first, then wrap model.forward"
            )
        if model.training:
            return "the model is in training mode; call model.eval()"
        if torch.is_grad_enabled() and (self._needs_grad() or getattr(embeds, "requires_grad", False)):
            return "grad mode is on and the model's weights or inputs need gradients; run under torch.no_grad()"
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return "autocast is on; load the model in the dtype that it is to run in"
        return self._changed() if self._watch is not None else None

    def _needs_grad(self) -> bool:
        return any(parameter.requires_grad for parameter in self.model.parameters())

    def _changed(self) -> str | None:
        """What is not as it was when the model was compiled; None once it is again."""
        assert self._watch is not None
        if self._read_implementations() != self._implementations:
            what = "the attention or experts implementation was changed after compiling"
        else:
            reason = self._watch.change()
            if reason is None:
                return None
            what = f"the model was changed after compiling: {reason}"
        return f"{what}; change it back, or call glowplug.compile(model) again"

    def _read_implementations(self) -> tuple[Any, ...]:
        config = self.model.config.get_text_config()
        experts = getattr(config, "_experts_implementation", None)
        # generate() itself switches between these on a GPU; they compute the same.
        return config._attn_implementation, None if experts in _SAME_EXPERTS else experts

    # -- building ---------------------------------------------------------------------------------------------

    def _build(self, call: Call) -> Served | Refusal:
        with self._lock:
            known = self._known(call.signature)
            if known is not None:
                return known
            try:
                found = self.builder.build(call)
            except (LayerOrderError, NotServableError):
                raise
            except Exception as exc:  # whatever it is, the model's own forward can be run
                found = why(exc)
            return self._keep(call.signature, found, for_good=False)

    def _keep(self, signature: Signature, found: Served | str, *, for_good: bool = True) -> Served | Refusal:
        if isinstance(found, str):
            rotary = rotary_layers(self.model).values()
            refusal = Refusal(found, None if for_good else Watch(self.model, followed=rotary))
            self._served[signature] = refusal
            self._refusals[signature] += 1
            self.report.strategy = "eager"
            return refusal
        self._served[signature] = found
        self._watch = self.builder.prover.watch
        self._implementations = self._read_implementations()
        return found


def _name(forward: Any) -> str:
    """What a forward is called, for a reason."""
    named = getattr(forward, "func", forward)
    return str(getattr(named, "__qualname__", type(named).__name__)).replace("<locals>.", "")


def _begun(call: Call) -> bool:
    """Whether the call goes on with a sequence."""
    return has_begun(call.cache)


def attach(model: PreTrainedModel, options: Options) -> None:
    """Put an engine in the place of the model's forward."""
    own = model.__dict__.pop("forward", None)
    engine = Engine(model, options, own.own if isinstance(own, Engine) else own)
    object.__setattr__(model, "forward", engine)


def engine_of(model: nn.Module) -> Engine | None:
    """The model's engine, or None."""
    found = model.__dict__.get("forward")
    return found if isinstance(found, Engine) else None
