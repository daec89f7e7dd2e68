"""What a worker changes before a start. Each runs in a process that starts vLLM once."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

notes: list[Any] = []
"""What a patch found out, for the test."""


# -- the plug-in -------------------------------------------------------------------------------------------------


def leave_uncompiled() -> None:
    """Let a decoder that the plug-in leaves to vLLM run uncompiled, as vLLM takes long to compile it."""
    from glowplug.frontends.vllm.decoder import Decoder
    from glowplug.frontends.vllm.start import LeftToVllmError

    own = Decoder._start

    def start(served: Any, decoder: Any, *args: Any) -> Any:
        try:
            return own(served, decoder, *args)
        except LeftToVllmError:
            decoder.do_not_compile = True
            raise

    Decoder._start = start


def miss_name(name: str) -> None:
    """Let vLLM lack a name that the plug-in needs."""
    from glowplug.frontends.vllm import private

    private._NAMES = (*private._NAMES, name)
    private.vllm.cache_clear()


def fail(module: str, name: str) -> None:
    """Let a function of the plug-in raise."""

    def raising(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("this is broken")

    setattr(importlib.import_module(f"glowplug.frontends.vllm.{module}"), name, raising)


def piecewise(forks: bool) -> None:
    """Let vLLM's own piecewise backend compile the pieces, as it does on a GPU; with `forks`, in forks, and as in a
    worker of several, which reads its environment only once. Notes each piece that is compiled here, and how often the
    decoder's own forward runs to be compared with."""
    from glowplug.frontends.vllm import pieces, start
    from glowplug.frontends.vllm.private import vllm

    class Forks:
        """What forks rely on where there is no GPU."""

        def load(self) -> bool:
            """They can compile."""
            return True

        def enter(self) -> bool:
            """Nothing to stand in for."""
            return True

        def begin(self, launches: Any) -> None:
            """No kernels."""

    def get(config: Any, prefix: str, ops: Any) -> Any:
        compilation = config.compilation_config
        before, compilation.mode = compilation.mode, vllm().CompilationMode.VLLM_COMPILE
        try:
            inner = pieces.PiecewiseCompiler(config, prefix)
        finally:
            compilation.mode = before
        inner.backend.inductor_config.pop(inner.backend.pass_key)  # vLLM's passes are for GPUs
        own = inner._compile

        def compile_here(piece: Any) -> Any:
            notes.append("compiled")
            return own(piece)

        class Noted(start.OwnForward):
            """The decoder's own forward."""

            @classmethod
            def of(cls, *args: Any) -> Any:
                notes.append("own forward")
                return own_forward.of(*args)

        own_forward, start.OwnForward = start.OwnForward, Noted

        inner._compile = compile_here
        if forks:
            inner._forks = Forks()
            vllm().envs.enable_envs_cache()
        return pieces.DecoderCompiler(inner, ops)

    start.get_compiler = get


# -- wrong programs ----------------------------------------------------------------------------------------------

Fault = Callable[[Any, int, Any], tuple[int, Any]]
"""(binder, layer, own) -> the layer and the place that a wrong program reads instead."""


def other_tensor(layer: int, path: str, other: int) -> Fault:
    """One tensor, or one name, of a layer is another layer's."""
    return lambda binder, at, own: (
        (other - own.offset, own) if (at + own.offset, own.path) == (layer, path) else (at, own)
    )


def swapped(first: int, second: int) -> Fault:
    """Two layers run in each other's place."""
    places = {first: second, second: first}
    return lambda binder, at, own: (places.get(at + own.offset, at + own.offset) - own.offset, own)


def wrongly(binder: Any, fault: Fault) -> Any:
    """A binder with a fault."""

    class Wrong(type(binder)):
        def find(self, layer: int, own: Any) -> Any:
            return binder.find(*fault(binder, layer, own))

    return Wrong(binder.stack, binder.layers, binder.names, binder.encode)


def bind_wrongly(kind: str, *arguments: Any) -> None:
    """Let the plug-in bind with a fault."""
    from glowplug.frontends.vllm.layers import SourceBinder

    own = SourceBinder.find
    fault = globals()[kind](*arguments)

    def find(binder: Any, layer: int, place: Any) -> Any:
        return own(binder, *fault(binder, layer, place))

    SourceBinder.find = find


def try_faults(layers: list[int]) -> None:
    """Before a program serves, compare it with each of its bindings to some layers replaced by that of the next layer
    with another value there, and with these layers and their neighbours swapped. `notes` gets each fault and what the
    comparison said of it, None if it saw nothing."""
    from glowplug.frontends.vllm import start
    from glowplug.graph.stamp import Own

    own_compare = start.compare

    def compare(decoder: Any, own: Any, tokens: int, ops: Any, stamped: Any, agree: Any) -> Any:
        binder = stamped.binder
        places = {
            (deep.layer + own_input.offset, own_input.path)
            for deep in stamped.plan.deep
            for own_input in deep.inputs.values()
            if isinstance(own_input, Own) and deep.layer + own_input.offset in layers
        }
        faults: list[tuple[Any, Fault]] = []
        for layer, path in sorted(places):
            other = _next(binder, layer, Own(0, path), len(binder.layers))
            if other is not None:
                faults.append(((layer, path, other), other_tensor(layer, path, other)))
        for layer in layers:
            other = layer + 1 if layer + 1 < len(binder.layers) else layer - 1
            faults.append(((layer, "swapped", other), swapped(layer, other)))
        for what, fault in faults:
            try:
                reason = own_compare(decoder, own, tokens, ops, replace(stamped, binder=wrongly(binder, fault)), agree)[
                    0
                ]
            except Exception as exc:
                reason = repr(exc)
            notes.append([*what, reason])
        return own_compare(decoder, own, tokens, ops, stamped, agree)

    start.compare = compare


def _next(binder: Any, layer: int, own: Any, depth: int) -> int | None:
    """The next layer that has something else, of the same form, at a place."""
    value = binder.find(layer, own)
    for other in [*range(layer + 1, depth), *range(layer - 1, -1, -1)]:
        try:
            found = binder.find(other, own)
        except Exception:
            continue
        if isinstance(value, torch.Tensor):
            if found.shape == value.shape and not torch.equal(found, value):
                return other
        elif found != value:
            return other
    return None


# -- models ------------------------------------------------------------------------------------------------------


def differ(how: str, layer: int) -> None:
    """Change one layer of the decoder once the weights are loaded."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    own = CPUModelRunner.load_model

    def load_model(runner: Any, *args: Any, **kwargs: Any) -> None:
        own(runner, *args, **kwargs)
        _DIFFERENCES[how](runner.model.model.layers, layer)

    CPUModelRunner.load_model = load_model


def _other_epsilon(layers: Any, layer: int) -> None:
    layers[layer].input_layernorm.variance_epsilon = 0.9


def _own_forward(layers: Any, layer: int) -> None:
    """One layer has a forward of its own."""
    own = layers[layer].forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, residual = own(*args, **kwargs)
        return hidden * 3.0, residual

    layers[layer].forward = forward


def _hook(layers: Any, layer: int) -> None:
    """One layer has a hook."""
    layers[layer].mlp.register_forward_hook(lambda module, args, output: output * 3.0)


def _by_number(layers: Any, layer: int) -> None:
    """All layers run the same code, which asks for the layer's number."""
    own = type(layers[0]).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden, residual = own(self, *args, **kwargs)
        return (hidden * 3.0 if self.number == layer else hidden), residual

    type(layers[0]).forward = forward
    for number, module in enumerate(layers):
        module.number = number


def _by_name(layers: Any, layer: int) -> None:
    """All layers run the same code, which asks for the name by which an op finds its layer."""
    own = type(layers[0]).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden, residual = own(self, *args, **kwargs)
        return (hidden * 3.0 if f".{layer}." in self.self_attn.attn.layer_name else hidden), residual

    type(layers[0]).forward = forward


def _by_identity(layers: Any, layer: int) -> None:
    """All layers run the same code, which looks itself up in a table outside of the decoder."""
    own = type(layers[0]).forward
    factors = {id(module): 3.0 if number == layer else 1.0 for number, module in enumerate(layers)}

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden, residual = own(self, *args, **kwargs)
        return hidden * factors[id(self)], residual

    type(layers[0]).forward = forward


def _shared_weight(layers: Any, layer: int) -> None:
    """One layer shares a weight with the layer before it."""
    layers[layer].input_layernorm.weight = layers[layer - 1].input_layernorm.weight


def _tied_in_pairs(layers: Any, layer: int) -> None:
    """From a layer on, layers share a weight in pairs."""
    for number in range(layer, len(layers) - 1, 2):
        layers[number + 1].input_layernorm.weight = layers[number].input_layernorm.weight


_DIFFERENCES: dict[str, Callable[[Any, int], None]] = {
    "epsilon": _other_epsilon,
    "forward": _own_forward,
    "hook": _hook,
    "number": _by_number,
    "name": _by_name,
    "identity": _by_identity,
    "shared": _shared_weight,
    "pairs": _tied_in_pairs,
}


def replace_module(name: str, file: str) -> None:
    """Let a Python module come from another file."""
    assert name not in sys.modules
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
