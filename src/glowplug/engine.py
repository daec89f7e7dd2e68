"""The engine of one model: reads each call, starts a program where one is missing, and runs it. Where no program
serves, the model's own forward runs, with a recorded reason. The engine does not know which front end it serves.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from glowplug.compilation import Compilation
from glowplug.compilers import get_compiler
from glowplug.compilers.base import StoringCompiler
from glowplug.errors import CompileError, LayerOrderError, NotServableError
from glowplug.front import Call, FrontEnd, NotTracedError
from glowplug.layers.context import ForwardContext
from glowplug.layers.registry import LayerRegistry
from glowplug.options import Options
from glowplug.program import Program
from glowplug.ready import Ready, Refusal, run_inputs
from glowplug.reasons import one_line, switched_off, why
from glowplug.report import ElsewhereReport, Report
from glowplug.runtime.forks import make_lock
from glowplug.start import find_stored, start
from glowplug.store import open_store

logger = logging.getLogger("glowplug")

_STATES = 5
"""How many states of a model are compiled, where a changed model is compiled again."""
_BUILDING = "the program is being built in another process"


class Engine:
    """Stands in for `model.forward`. Made by `glowplug.compile`.

    Args:
        front: the front end of the model.
        options: how to compile it.
        check_order: with `identity="ordered"`, whether a wrong order raises. Only a demonstration turns it off.
        keeps: what lives as long as the engine, such as the job that still compiles its deferred pieces.
    """

    def __init__(self, front: FrontEnd, options: Options, *, check_order: bool = True, keeps: Any = None) -> None:
        functools.update_wrapper(self, type(front.model).forward, updated=())
        self.__signature__ = inspect.signature(front.forward)
        self.front = front
        self.options = options
        self.check_order = check_order
        self.keeps = keeps
        self.compiler = get_compiler(options.compiler)
        self.report = Report(compiler=self.compiler.name)
        self._lock = make_lock()
        self._states: list[Compilation] = []
        self._builds = front.builds(self.report) if options.background else None
        place = (self._builds.options if self._builds is not None else options).cache_dir
        self._store = open_store(place) if isinstance(self.compiler, StoringCompiler) else None

    @property
    def compilation(self) -> Compilation:
        """The latest. The first is made when it is asked for: it reads the model, which is not whole yet while a copy's
        engine is made."""
        if self._states:  # without the lock, which a thread that compiles holds
            return self._states[-1]
        with self._lock:
            return self._states[-1] if self._states else self._compile()

    @property
    def registry(self) -> LayerRegistry:
        """The model's layers."""
        return self.compilation.registry

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        model = memo.get(id(self.front.model))
        if model is None:
            raise NotServableError("a compiled forward can't be copied without its model; copy the model")
        return _remake(type(self.front), model, copy.deepcopy(self.front.own, memo), self.options, self.check_order)

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (type(self.front), self.front.model, self.front.own, self.options, self.check_order)

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, by a program where one serves."""
        refusal, output = self._serve(args, kwargs)
        if refusal is None:
            return output
        output = self._without_program(refusal, args, kwargs)
        if self._builds is not None and refusal.build is not None:
            self._builds.begin(refusal.build)  # now that the call was served, which so is not slowed down
        return output

    def prepare(self) -> Report:
        """Make the program for the model's first call now."""
        call = self.front.first_call()
        ready = self._start(self.compilation, call) if not isinstance(call, str) else Refusal(call)
        if isinstance(ready, Refusal) and ready.reason:
            self.report.fall_back(ready.reason)
        return self.report

    def settle(self, timeout_s: float) -> None:
        """Wait for what is compiled in the background, and put it to use."""
        deadline = time.monotonic() + timeout_s
        if self._builds is not None:
            self._builds.wait(deadline)
        for state in self._states:
            state.poll(deadline)

    @torch.compiler.disable
    def _serve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Refusal | None, Any]:
        """Why no program serves a call; or what one returned."""
        reason = switched_off() or self.front.unfit(args, kwargs)
        if reason is None and self._states and not self.front.restarts:
            reason = self._states[-1].change()
        if reason is not None:
            return Refusal(reason), None
        call = self.front.read(args, kwargs)
        if isinstance(call, str):
            return Refusal(call, eager=self.front.guarded is None), None
        if self._builds is not None and self._builds.is_first(call):
            return Refusal(_BUILDING), None
        state = self._current()
        if isinstance(state, Refusal):
            return state, None
        ready = state.known(call)
        is_new = ready is None
        if ready is None:
            ready = self._take_over(state, call) if self._builds is not None else self._start(state, call)
        if isinstance(ready, Refusal):
            return ready, None
        reason = ready.broken_by(call) if is_new else None
        if reason is not None:
            return Refusal(reason, eager=self.front.guarded is None), None
        return None, self._run(state, ready, call, is_new=is_new)

    def _run(self, state: Compilation, ready: Ready, call: Call, *, is_new: bool) -> Any:
        running = ready.sequences.of(call.cache) if call.has_begun else None
        if running is None:
            if not is_new:
                self._poll(state)
            running = ready.begin(call.cache, state.bodies)
        self.report.serving = "program"
        bodies = running.bodies.unchanged(self.report)
        inputs = self.front.inputs(running.program.arguments, call)
        attend = self.front.attend
        run = _runner(state.registry, bodies, self.check_order, attend)
        outputs: Sequence[Any] | None = None
        if state.graphs is not None and (step := self.front.step(call)) is not None:
            held = (state.registry, attend, *bodies.values())
            outputs = state.graphs.run(step, running.program, held, inputs, run)
        if outputs is None:
            outputs = run(running.program, call.cache, inputs)
        return self.front.wrap(ready.returns, call, outputs)

    def _poll(self, state: Compilation) -> None:
        """Put to use what was compiled in the background. Whatever comes of it, the call goes on."""
        try:
            state.poll()
        except Exception as exc:
            logger.warning("glowplug: what was compiled in the background is not used: %s", one_line(why(exc)))
            logger.debug("glowplug: where it was raised", exc_info=exc)

    def _without_program(self, refusal: Refusal, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call that no program serves."""
        reason = refusal.reason
        if not refusal.eager and self.front.guarded is not None:
            try:
                self.report.serving = "program"
                return self.front.guarded(self.registry, self.report, self.check_order, args, kwargs)
            except NotTracedError as exc:
                reason = str(exc)
        self.report.serving = f"eager: {reason}"
        if reason != _BUILDING:
            if self.options.strict:
                raise NotServableError(f"{reason} (strict=True: nothing runs eager)")
            self.report.fall_back(reason)
        return self.front.forward(*args, **kwargs)

    # -- starting ---------------------------------------------------------------------------------------------

    def _compile(self) -> Compilation:
        state = Compilation(
            self.front, self.options, self.compiler, self.report, self._store, check_order=self.check_order
        )
        self._states.append(state)
        return state

    def _current(self) -> Compilation | Refusal:
        """The compilation of the model as it is now."""
        if not self._states or not self.front.restarts:
            return self.compilation
        changed: str | None = None
        for state in reversed(self._states):
            changed = state.change()
            if changed is None:
                return state
        with self._lock:
            if self._states[-1].change() is None:  # another thread has seen the change before
                return self._states[-1]
            if len(self._states) < _STATES:
                return self._compile()
        self.report.fall_back(f"the module was changed {len(self._states)} times: {changed}", to="hoisted")
        return Refusal("", eager=False)

    def _start(self, state: Compilation, call: Call) -> Ready | Refusal:
        with self._lock:
            known = state.known(call)
            if known is not None:
                return known
            try:
                ready = start(state, call)
            except (LayerOrderError, NotServableError):
                raise
            except Exception as exc:  # whatever it is, the model's own forward can be run
                ready = why(exc)
                if self.front.guarded is not None and not isinstance(exc, (CompileError, OSError)):
                    state.step_down(ready)
            return state.keep(call, ready)

    def _take_over(self, state: Compilation, call: Call) -> Ready | Refusal:
        """The program that another process has built; until there is one, eager serves."""
        assert self._builds is not None
        if state.distributed:
            self.report.elsewhere = ElsewhereReport(0.0, reason="the model is distributed over processes")
            self._builds = None
            return self._start(state, call)
        with self._lock:
            known = state.known(call)
            if known is not None:
                return known
            outcome = self._builds.outcome(call)
            if outcome is None and self._builds.began(call):
                return Refusal(_BUILDING)
            if outcome is not None and outcome.reason is not None:
                what = f"the build in another process came to nothing: {outcome.reason}"
                return state.keep(call, what, for_good=True)
            stored = find_stored(state, call)
            if stored is not None:
                return state.keep(call, stored)
            if outcome is None:
                return Refusal(_BUILDING, build=call)
            what = f"what another process built can't be used: {state.why_unused(outcome.facts)}"
            return state.keep(call, what, for_good=True)


def _runner(
    registry: LayerRegistry, bodies: Any, check_order: bool, attend: Any
) -> Callable[[Program, Any, Sequence[Any]], Sequence[Any]]:
    """What runs a program on a cache and its inputs."""

    def run(program: Program, cache: Any, inputs: Sequence[Any]) -> Sequence[Any]:
        return run_inputs(program, inputs, ForwardContext(registry, cache, check_order, bodies, attend))

    return run


def _remake(front: type[FrontEnd], model: nn.Module, own: Any, options: Options, check_order: bool) -> Engine:
    return Engine(front(model, options, own), options, check_order=check_order)


def attach(front: type[FrontEnd], model: nn.Module, options: Options, **kwargs: Any) -> Engine:
    """Put an engine in the place of the model's forward."""
    own = model.__dict__.pop("forward", None)
    engine = Engine(front(model, options, own.front.own if isinstance(own, Engine) else own), options, **kwargs)
    object.__setattr__(model, "forward", engine)
    return engine


def engine_of(model: nn.Module) -> Engine | None:
    """The model's engine, or None."""
    forward = model.__dict__.get("forward")
    return forward if isinstance(forward, Engine) else None
