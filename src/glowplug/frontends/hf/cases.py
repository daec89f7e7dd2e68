"""The calls by which a program is compared with a transformers model: short seeded sequences, in steps, with caches of
their own. They cover padding on each side, masks and positions given and left out, windows that are shorter than the
text, all logits and only the last.
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
"""(sequences, tokens of each step) of each comparison."""
CLASSES: Classes = ((3, (3, 1)), (1, (1, 3)))
"""Several sequences and one, several tokens and one, an empty cache and a filled. Several are padded on the left and on
the right, and have positions as `generate` makes them; one has neither mask nor positions."""
GLANCE: Classes = ((1, (3,)),)
"""For a program that an earlier process compared in every class: is it this model's?"""
WINDOW = 4
"""Tokens of a short window. Masks are made outside of the program: within a window that is longer than the text nothing
would show that the model's own differ from them only beyond it."""
_BEYOND_A_WINDOW = (2 * WINDOW - 1, 1)
"""Tokens of each step of the first comparison of a model with windows: some lie within, some beyond."""
_WINDOWS = ("sliding_window", "attention_chunk_size")


@dataclass(frozen=True)
class Step:
    """One step of some sequences.

    Attributes:
        what: the step, in words.
        call: the call, ready for a program, but for a cache of the program's own.
        output: what the model's own forward gives.
    """

    what: str
    call: HfCall
    output: ModelOutput


def sequences(
    model: PreTrainedModel, call: HfCall, classes: Classes = CLASSES, *, unsaid: bool = False
) -> Iterator[tuple[PreTrainedModel, list[Step]]]:
    """The steps of some sequences, for each class of sizes, and the model whose caches they take.

    Args:
        model: the model; its own forward is run.
        call: a call that a program is to serve; its signature is kept to.
        classes: the sizes.
        unsaid: whether one sequence may be given neither mask nor positions.

    Raises:
        NotServableError: the model's own forward can't be run, or gives more than a program would.
    """
    for number, (batch, steps) in enumerate(classes):
        short = with_short_windows(model) if number == 0 and len(steps) > 1 else None  # a glance looks at none
        try:
            made = _steps(short, call, batch, _BEYOND_A_WINDOW, unsaid) if short is not None else None
        except NotServableError:
            raise
        except Exception:  # no other window than its own fits the model
            made = None
        if short is not None and made is not None:
            yield short, [replace(step, what=f"{step.what}, with a window of {WINDOW} tokens") for step in made]
        else:
            yield model, _steps(model, call, batch, steps, unsaid)


def with_short_windows(model: PreTrainedModel) -> PreTrainedModel | None:
    """A model that shares every layer and weight with `model`, which stays as it is, but makes its masks and caches for
    a window of `WINDOW` tokens, as its config says. None when it has no longer one."""
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
def _steps(model: PreTrainedModel, call: HfCall, batch: int, steps: tuple[int, ...], unsaid: bool) -> list[Step]:
    signature = call.signature
    whole, mask, positions = _text(model, call, batch, steps)
    if batch == 1 and unsaid:
        mask = positions = None
    cache, name = new_cache(model), cache_argument(model)
    keeps_keys = seen_tokens(cache) is not None
    made: list[Step] = []
    start = 0
    for step in steps:
        stop = start + step
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
        ready = read_call(model, (), kwargs)
        if isinstance(ready, str):
            raise NotServableError(ready)
        try:
            output = type(model).forward(model, **kwargs)
        except Exception as exc:
            raise NotServableError(f"the model's own forward raised {said(exc)}") from exc
        extra = [found for found in output if found not in ("logits", name)]
        if extra:
            raise NotServableError(
                f"the model's output carries {', '.join(extra)}, which the compiled program does not compute"
            )
        made.append(Step(f"{batch} x {step} tokens after {start}", ready, output))
        start = stop
    return made


def _text(
    model: PreTrainedModel, call: HfCall, batch: int, steps: tuple[int, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Seeded text, its mask and its positions. Of several sequences the first is padded on the left, the second on the
    right of its first step, and the third behind it."""
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
