"""The calls on which a program is compared with a transformers model: short seeded sequences, run step by step with
caches of their own. They cover left and right padding, calls with and without mask and positions, attention windows
shorter than the text, and the logits of all tokens or of the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from glowplug.errors import NotServableError
from glowplug.frontends.hf.caches import new_cache, seen_tokens
from glowplug.frontends.hf.calls import HfCall, cache_argument, read_call
from glowplug.frontends.hf.discover import Shadow
from glowplug.reasons import said

Classes = Sequence[tuple[int, tuple[int, ...]]]
"""(number of sequences, tokens of each step) of each comparison."""
CLASSES: Classes = ((3, (3, 1)), (1, (1, 3)))
"""Several sequences and one, several tokens and one, an empty cache and a filled one. Several sequences are padded on
the left and on the right and have positions as `generate` makes them; a single one has neither mask nor positions."""
GLANCE: Classes = ((1, (3,)),)
"""For a program that an earlier process has compared in every class: shows only that it belongs to this model."""
WINDOW = 4
"""Tokens of a short window. Masks are made outside the program; they could differ from the model's own only beyond the
window, which a text that fits into the window would not show."""
_BEYOND_A_WINDOW = (2 * WINDOW - 1, 1)
"""Tokens of each step in the first comparison of a model with windows: some within the window, some beyond."""
_WINDOWS = ("sliding_window", "attention_chunk_size")


@dataclass(frozen=True)
class Step:
    """One step of some sequences.

    Attributes:
        what: the step, in words.
        call: the call; a program runs it with a cache of its own.
        output: the output of the model's own forward.
    """

    what: str
    call: HfCall
    output: ModelOutput


def sequences(
    model: PreTrainedModel, call: HfCall, classes: Classes = CLASSES, *, bare: bool = False
) -> Iterator[tuple[PreTrainedModel, list[Step]]]:
    """Run the model's own forward on sequences of each class of sizes.

    Args:
        model: the model.
        call: a call for which the program is made; the steps get its signature.
        classes: the sizes.
        bare: whether a single sequence goes without mask and positions.

    Yields:
        For each class, the model whose caches the steps need, and the steps.

    Raises:
        NotServableError: the model's own forward can't run, or returns more than a program would.
    """
    for number, (batch, steps) in enumerate(classes):
        short = _with_short_windows(model) if number == 0 and len(steps) > 1 else None  # GLANCE skips windows
        try:
            windowed = _steps(short, call, batch, _BEYOND_A_WINDOW, bare) if short is not None else None
        except NotServableError:
            raise
        except Exception:  # the model works with no other window than its own
            windowed = None
        if short is not None and windowed is not None:
            yield short, [replace(step, what=f"{step.what}, with a window of {WINDOW} tokens") for step in windowed]
        else:
            yield model, _steps(model, call, batch, steps, bare)


def _with_short_windows(model: PreTrainedModel) -> PreTrainedModel | None:
    """A copy that shares all layers and weights but makes masks and caches for a window of `WINDOW` tokens. None if the
    model has no longer window."""
    shadow = Shadow(model, into=lambda module: isinstance(module, PreTrainedModel))
    long = [
        (config, name)
        for config in shadow.configs
        for name in _WINDOWS
        if isinstance(getattr(config, name, None), int) and getattr(config, name) > WINDOW
    ]
    for config, name in long:
        setattr(config, name, WINDOW)
    short: Any = shadow.root
    return short if long else None


@torch.no_grad()
def _steps(model: PreTrainedModel, call: HfCall, batch: int, steps: tuple[int, ...], bare: bool) -> list[Step]:
    signature = call.signature
    whole, mask, positions = _text(model, call, batch, steps)
    if batch == 1 and bare:
        mask = positions = None
    cache, name = new_cache(model), cache_argument(model)
    keeps_keys = seen_tokens(cache) is not None
    results: list[Step] = []
    start = 0
    for length in steps:
        stop = start + length
        kwargs: dict[str, Any] = {
            "inputs_embeds" if signature.embeds else "input_ids": whole[:, start:stop].contiguous(),
            "use_cache": True,
            name: cache,
        }
        if mask is not None and (keeps_keys or start == 0):  # as generate does
            kwargs["attention_mask"] = mask[:, :stop]
        if positions is not None:
            kwargs["position_ids"] = positions[..., start:stop].contiguous()
        if signature.keeps and start > 0:
            kwargs["logits_to_keep"] = 1
        step_call = read_call(model, (), kwargs)
        if isinstance(step_call, str):
            raise NotServableError(step_call)
        try:
            output = type(model).forward(model, **kwargs)
        except Exception as exc:
            raise NotServableError(f"the model's own forward raised {said(exc)}") from exc
        extra = [key for key in output if key not in ("logits", name)]
        if extra:
            raise NotServableError(
                f"the model's output carries {', '.join(extra)}, which the compiled program does not compute"
            )
        results.append(Step(f"{batch} x {length} tokens after {start}", step_call, output))
        start = stop
    return results


def _text(
    model: PreTrainedModel, call: HfCall, batch: int, steps: tuple[int, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Seeded text, its mask and its positions. Of several sequences, the first is padded on the left, the second at the
    end of its first step, and the third in all further steps."""
    signature = call.signature
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(batch)
    tokens = sum(steps)
    if signature.embeds:
        whole = torch.randn((batch, tokens, call.inputs.shape[-1]), generator=generator)
        whole = whole * getattr(config, "initializer_range", 0.02)
    else:
        whole = torch.randint(config.vocab_size, (batch, tokens), generator=generator)
    whole = whole.to(signature.device, signature.dtype)
    mask = torch.ones(batch, tokens, dtype=torch.long, device=signature.device)
    if batch > 1:
        mask[0, :2] = 0
        mask[1, steps[0] - 2 : steps[0]] = 0
        mask[2, steps[0] :] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0).expand(*signature.position_lead, batch, tokens)
    return whole, mask, positions
