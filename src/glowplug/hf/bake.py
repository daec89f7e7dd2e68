"""Traces and compiles a model from its configuration alone: no weights, and no memory for them."""

from __future__ import annotations

from transformers import PreTrainedModel

from glowplug.hf.build import Builder
from glowplug.hf.engine import attach, engine_of
from glowplug.options import Options


def bake(model: PreTrainedModel, options: Options, *, bodies: bool = True) -> Builder:
    """Put the compiled program of a weightless model, and all that it needs, into the store.

    Args:
        model: made by `weightless_model`.
        options: as those of the process that will serve it.
        bodies: also what that process would compile beside serving. Without, it is ready sooner.

    Returns:
        What did it. Its report says what was done, or in `fallbacks` why nothing could be. With `ends="auto"`, ends are
        still being compiled; see `Builder.finish`.
    """
    attach(model, options)
    engine = engine_of(model)
    assert engine is not None
    engine.builder.bakes_bodies = bodies
    engine.prepare()
    return engine.builder
