"""What vLLM calls in the place of a decoder's compiled function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from glowplug.frontends.vllm.calls import DecoderCall, read_call, readers
from glowplug.frontends.vllm.log import logger
from glowplug.frontends.vllm.private import vllm
from glowplug.frontends.vllm.stamped import Stamped
from glowplug.frontends.vllm.start import FIRST_RUN, LeftToVllmError, Start
from glowplug.reasons import why


class Decoder:
    """Serves the calls of a decoder. The first one starts it; if that fails, vLLM compiles the decoder."""

    def __init__(self) -> None:
        self._served: dict[Any, Served] = {}
        self._refused: dict[Any, str] = {}

    def __call__(self, decoder: Any, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward."""
        key = (len(args), *kwargs, *map(_form, args), *map(_form, kwargs.values()))
        served = self._served.get(key)
        outputs: Sequence[Any] | None = None
        if served is None:
            reason = self._refused.get(key)
            if reason is None:
                try:
                    served, outputs = self._start(decoder, args, kwargs)
                    self._served[key] = served
                except LeftToVllmError as exc:
                    reason = str(exc)
                except Exception as exc:  # vLLM can compile without glowplug
                    logger().debug("glowplug: the start failed", exc_info=True)
                    reason = why(exc)
            if reason is not None and not self._served:
                logger().info("glowplug: %s is left to vLLM: %s", type(decoder).__name__, reason)
                decoder.aot_compiled_fn = None
                return type(decoder).__call__(decoder, *args, **kwargs)
        elif not served.is_valid():
            served, reason = None, "a weight or module was replaced by one of another form"
        if served is not None:
            return served((*args, *kwargs.values())) if outputs is None else served.returned(outputs)
        # vLLM would compile for seconds while it serves.
        if self._refused.get(key) != reason:
            logger().warning("glowplug: some calls of %s run uncompiled: %s", type(decoder).__name__, reason)
            self._refused[key] = str(reason)
        return decoder.forward(*args, **kwargs)

    def _start(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Served, Sequence[Any] | None]:
        """What serves calls like this one, and the outputs of this one if they are known."""
        call = read_call(decoder, args, kwargs)
        if isinstance(call, str):
            raise LeftToVllmError(call)
        start = Start(decoder, call)
        stamped = start.run()
        served = Served(decoder, call, stamped, (*args, *kwargs.values()))
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in start.seconds.items())
        total = sum(seconds for name, seconds in start.seconds.items() if name != FIRST_RUN)
        logger().info("glowplug: %s, stamped %d layers; %.1f s (%s)", stamped.how, stamped.depth, total, parts)
        return served, start.outputs


def _form(value: Any) -> Any:
    """What tells calls apart that need different programs."""
    if isinstance(value, Tensor):
        return value.dtype, value.dim()
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value)


class Served:
    """A stamped decoder, bound to its weights, each piece with a CUDA graph of its own where vLLM uses those.

    Args:
        decoder: the decoder.
        call: the call that it was made for.
        stamped: what the start gave.
        given: the arguments of that call, in the order in which later ones come.
    """

    def __init__(self, decoder: Any, call: DecoderCall, stamped: Stamped, given: Sequence[Any]) -> None:
        self._decoder = decoder
        self._stamped = stamped
        self._form = stamped.returns
        places = {id(value): number for number, value in enumerate(given)}
        self._tensors = [places[id(tensor)] for tensor in call.tensors]
        self._wrapped: dict[int, Callable[..., Any]] = {}
        steps = [index for index, deep in enumerate(stamped.plan.deep) if deep.slot not in stamped.ops]
        self._first, self._last = steps[0], steps[-1]
        self._bind()
        self._forms = self._bound.forms()

    def _bind(self) -> None:
        """Write the program for what the decoder holds now."""
        stamped, decoder = self._stamped, self._decoder
        program = stamped.write(decoder, wrap=self._wrap)
        self._run = functools.partial(program.code, None)
        self._read = readers(program.arguments, decoder)
        self._bound = stamped.bound(decoder)

    def is_valid(self) -> bool:
        """Whether the program serves the decoder as it is now: whether tensors and modules have the form that compiled
        code relies on. Binds the program to those that were replaced."""
        if self._bound.is_current():
            return True
        try:
            bound = self._stamped.bound(self._decoder)
        except LookupError:
            return False
        if bound.forms() != self._forms:
            return False
        self._bind()
        return True

    def _wrap(self, index: int, run: Callable[..., Any]) -> Callable[..., Any]:
        """What the step at an index calls: splitting ops as they are, pieces in a CUDA graph of their own."""
        if index not in self._wrapped:
            config = self._decoder.vllm_config
            is_op = self._stamped.plan.deep[index].slot in self._stamped.ops
            self._wrapped[index] = run
            if not is_op and config.compilation_config.mode == vllm().CompilationMode.VLLM_COMPILE:
                self._wrapped[index] = vllm().wrap_with_cudagraph_if_needed(
                    run, config, config.compilation_config, index == self._first, index == self._last
                )
        return self._wrapped[index]

    def __call__(self, values: Sequence[Any]) -> Any:
        """The decoder's forward on arguments in the order of its first call."""
        tensors = [values[number] for number in self._tensors]
        return self.returned(self._run(*[read(tensors) for read in self._read]))

    def returned(self, outputs: Sequence[Any]) -> Any:
        """What the decoder returns, from the program's outputs."""
        return outputs[0] if self._form is None else pytree.tree_unflatten(list(outputs), self._form)
