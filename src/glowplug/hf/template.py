"""The layer stack of a transformers model, and its template."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from glowplug.errors import NotStampableError
from glowplug.hf.interfaces import token_mixers
from glowplug.layers.stack import LayerStack, find_stack
from glowplug.program import template as templates
from glowplug.program.template import Template


def stack_of(model: nn.Module, told: Collection[str] | None = None) -> LayerStack | None:
    """The stack of a transformers model: each of its layers mixes tokens.

    Args:
        model: the model.
        told: see `glowplug.layers.kinds.tell_apart`.
    """
    config: Any = model.config
    return find_stack(model, list(token_mixers(model).values()), config.get_text_config(), told)


def choose(model: PreTrainedModel, told: Collection[str]) -> Template | None:
    """The template of a model; None when the model is no deeper than its template would be.

    Most models have one where every attribute tells layers apart, which no trace can overthrow. Only where layers
    differ too much for that are attributes left out that no trace has read.

    Args:
        model: the model.
        told: see `glowplug.layers.kinds.tell_apart`.

    Raises:
        NotStampableError: the model is deep, but its layers differ too much, or it has no stack.
    """
    strict = stack_of(model) if not told else None
    if strict is not None:
        with contextlib.suppress(NotStampableError):
            return templates.choose(strict)
    stack = stack_of(model, told)
    if stack is None:
        if len(token_mixers(model)) <= 4:
            return None
        raise NotStampableError("the model has no list of layers with one token mixer each")
    return templates.choose(stack)
