"""Before a program serves: one comparison with the model's own forward, on a small seeded input and a cache of its own.

It covers what structure alone can't prove: that one capture serves a prefill and a decode step, that masks reach the
right layers, and that the model's output has nothing besides logits and the cache.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from glowplug.hf.call import Call, read_call

if TYPE_CHECKING:
    from glowplug.hf.engine import Engine, Served

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest ||program - eager|| / ||eager|| by dtype; a wrong layer gives about 1. Half precision: 0.1."""


def output_type(model: PreTrainedModel) -> type:
    """The class of the model's output, from the annotation of its forward."""
    forward = inspect.unwrap(type(model).forward)
    try:
        annotation = get_type_hints(forward).get("return")
    except (NameError, TypeError):
        annotation = None
    for candidate in getattr(annotation, "__args__", (annotation,)):
        if isinstance(candidate, type) and issubclass(candidate, ModelOutput):
            return candidate
    return CausalLMOutputWithPast


def compare(engine: Engine, served: Served, call: Call) -> str | None:
    """Compare the logits of short sequences, in every class of sizes: several sequences and one, several tokens and
    one, a cache that is empty, of one token, of several; left padding; all logits and only the last.

    Returns:
        Why the program must not serve, or None.
    """
    with torch.no_grad():
        return _compare_steps(engine, served, call, batch=2, steps=(7, 1)) or _compare_steps(
            engine, served, call, batch=1, steps=(1, 3)
        )


def _compare_steps(engine: Engine, served: Served, call: Call, *, batch: int, steps: tuple[int, ...]) -> str | None:
    model, signature = engine.model, call.signature
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(batch)
    tokens = sum(steps)
    if signature.embeds:
        whole = torch.randn((batch, tokens, call.inputs.shape[-1]), generator=generator) * config.initializer_range
    else:
        whole = torch.randint(config.vocab_size, (batch, tokens), generator=generator)
    whole = whole.to(signature.device, signature.dtype)
    mask = torch.ones(batch, tokens, dtype=torch.long, device=signature.device)
    if batch > 1:
        mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0).expand(*signature.position_lead, batch, tokens)
    caches = [DynamicCache(config=config), DynamicCache(config=config)]
    start = 0
    for step in steps:
        stop = start + step
        kwargs: dict[str, Any] = {
            "inputs_embeds" if signature.embeds else "input_ids": whole[:, start:stop].contiguous(),
            "attention_mask": mask[:, :stop],
            "position_ids": positions[..., start:stop].contiguous(),
            "use_cache": True,
        }
        if signature.keeps and start > 0:
            kwargs["logits_to_keep"] = 1
        expected = type(model).forward(model, **kwargs, past_key_values=caches[0])
        extra = [name for name in expected if name not in ("logits", "past_key_values")]
        if extra:
            return f"the model's output carries {', '.join(extra)}, which the compiled program does not compute"
        ready = read_call(model, (), {**kwargs, "past_key_values": caches[1]})
        if isinstance(ready, str):
            return ready
        actual = engine.run_program(served, ready)
        served.output_type = type(expected)
        problem = _differs(actual.logits, expected.logits, f"{batch} x {step} tokens after {start}")
        if problem is not None:
            return problem
        start = stop
    return None


def _differs(actual: Tensor, expected: Tensor, what: str) -> str | None:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"the compiled program gives {tuple(actual.shape)} {actual.dtype}, eager {tuple(expected.shape)}"
    error = float((actual - expected).float().norm() / expected.float().norm().clamp(min=1e-30))
    allowed = _TOLERANCE.get(expected.dtype, 0.1)
    if not error <= allowed:
        return f"the compiled program differs from eager by {error:.1e} (allowed {allowed:.0e}) for {what}"
    return None
