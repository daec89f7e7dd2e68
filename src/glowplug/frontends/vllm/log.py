"""The logger of the plug-in: one of vLLM's, so that its lines look and go as vLLM's do."""

from __future__ import annotations

import functools
import logging


@functools.cache
def logger() -> logging.Logger:
    """A child of vLLM's logger, which vLLM has set up."""
    return logging.getLogger("vllm.glowplug")


def share_handlers() -> None:
    """Let what the rest of glowplug says go where vLLM's lines go."""
    rest, own = logging.getLogger("glowplug"), logging.getLogger("vllm")
    if not rest.handlers:
        for handler in own.handlers:
            rest.addHandler(handler)
