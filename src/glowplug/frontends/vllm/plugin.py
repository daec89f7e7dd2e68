"""The plug-in, which vLLM loads in each of its processes as an entry point of the group `vllm.general_plugins`.

It wraps one method: the constructor by which vLLM prepares a decoder for compilation. A decoder that glowplug may serve
gets a callable in the attribute under which vLLM keeps a compiled function (`aot_compiled_fn`), and vLLM calls that. A
decoder that is left alone is compiled by vLLM as ever, and one log line says why.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import Any

import torch

from glowplug.frontends.vllm.log import logger, share_handlers
from glowplug.frontends.vllm.private import UnsupportedVllmError, vllm

VARIABLE = "GLOWPLUG_VLLM"
"""The environment variable that switches the plug-in off."""
_OFF = ("0", "off", "false", "no")
_MARK = "_glowplug_wrapped"
_warmed_up = threading.Event()


def switched_off() -> bool:
    """Whether `GLOWPLUG_VLLM` switches the plug-in off."""
    return os.environ.get(VARIABLE, "").lower() in _OFF


def register() -> None:
    """Install the plug-in in this process. Does nothing the second time, or if `GLOWPLUG_VLLM=0`. Never raises."""
    if switched_off():
        return
    try:
        wrapper = vllm().TorchCompileWithNoGuardsWrapper
    except Exception as exc:  # a plug-in must not keep vLLM from starting
        reason = str(exc) if isinstance(exc, UnsupportedVllmError) else f"{type(exc).__name__}: {exc}"
        logger().warning("glowplug: vLLM compiles without it: %s", reason)
        return
    if hasattr(wrapper.__init__, _MARK):
        return
    share_handlers()
    own = wrapper.__init__

    @functools.wraps(own)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        try:
            _offer(self)
        except Exception as exc:  # vLLM can compile without it
            _log(f"{type(self).__name__} is left to vLLM: {type(exc).__name__}: {exc}")

    setattr(prepare, _MARK, own)
    wrapper.__init__ = prepare


def unregister() -> None:
    """Take the plug-in out of this process: decoders that are made from now on are compiled by vLLM."""
    wrapper = vllm().TorchCompileWithNoGuardsWrapper
    wrapper.__init__ = getattr(wrapper.__init__, _MARK, wrapper.__init__)


def _offer(decoder: Any) -> None:
    """Serve a decoder, or say why it is left to vLLM."""
    from glowplug.frontends.vllm.decoder import Decoder
    from glowplug.frontends.vllm.fitness import why_left_alone

    reason = why_left_alone(decoder)
    if reason is not None:
        _log(f"{type(decoder).__name__} is left to vLLM: {reason}")
        return
    decoder.aot_compiled_fn = Decoder()
    _warm_up(decoder.vllm_config)


def _warm_up(config: Any) -> None:
    """Start the compiler's one-off work once per process, while the weights load."""
    from glowplug.compilers.gpu.warm import warm_up

    if config.compilation_config.mode == vllm().CompilationMode.VLLM_COMPILE and not _warmed_up.is_set():
        _warmed_up.set()
        warm_up(torch.cuda.current_device() if torch.cuda.is_initialized() else None)


def _log(message: str) -> None:
    logger().info("glowplug: %s", message)
