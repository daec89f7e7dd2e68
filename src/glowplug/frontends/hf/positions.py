"""The `position_ids` that a call leaves out: each model fills them in by a rule of its own, by counting tokens or from
its attention mask. A program takes them from outside, so the model's own forward is asked which rule it has."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from glowplug.frontends.hf.caches import new_cache, seen_tokens
from glowplug.frontends.hf.calls import HfCall, cache_argument
from glowplug.frontends.hf.discover import stack_of
from glowplug.frontends.hf.entries import rotary_state_kept
from glowplug.program import template as templates
from glowplug.program.template import Template
from glowplug.verify.closeness import EXACT, distance

Rule = Callable[[Tensor, Any, int], Tensor]
"""`rule(mask, seen, tokens)`: positions, `[batch or 1, tokens]`, of a step's tokens after those seen."""


def _counted(mask: Tensor, seen: Any, tokens: int) -> Tensor:
    return torch.arange(tokens, device=mask.device).unsqueeze(0) + seen


def _from_mask(mask: Tensor, seen: Any, tokens: int, at_padding: int | None) -> Tensor:
    positions: Tensor = mask.cumsum(dim=1)
    if at_padding is None:  # padding is then before the first token
        return (positions * mask - 1).long()[:, seen:]
    return (positions.long() - 1).masked_fill(mask == 0, at_padding)[:, seen:]


RULES: dict[str, Rule] = {
    "counted": _counted,
    "counted anew": lambda mask, seen, tokens: _counted(mask, 0, tokens),
    "from the mask": lambda mask, seen, tokens: _from_mask(mask, seen, tokens, None),
    "from the mask, 0 at padding": lambda mask, seen, tokens: _from_mask(mask, seen, tokens, 0),
    "from the mask, 1 at padding": lambda mask, seen, tokens: _from_mask(mask, seen, tokens, 1),
}
"""The rules that models have, the most common first."""
_UNMASKED = ("counted", "counted anew")
"""Those for calls without a mask."""

_STEPS = (5, 2)
"""Tokens of each step of the calls that a model is asked with."""


@dataclass(frozen=True)
class _Found:
    """What a model does with a call without positions.

    Attributes:
        unmasked: how it fills positions in when there is no mask; None for a way that glowplug does not know.
        masked: the same when there is one.
    """

    unmasked: str | None
    masked: str | None


class Positions:
    """Fills in the positions that calls of a model leave out.

    Args:
        model: the model; its forward is run when it is first asked for its rule.
        agree: of a model that several processes run together: makes what one finds the finding of all.
    """

    def __init__(self, model: PreTrainedModel, agree: Callable[[str | None], str | None] | None = None) -> None:
        self.model = model
        self._agree = agree
        self._found: _Found | None = None

    @property
    def found(self) -> _Found:
        """The model's rule."""
        if self._found is None:
            self._found = self._ask()
        return self._found

    def fill(self, call: HfCall) -> Tensor | str:
        """The positions that the model would give a call, `[batch, tokens]`; or why they can't be told."""
        batch, tokens = call.inputs.shape[:2]
        seen = seen_tokens(call.cache)
        if seen is None:
            return "the cache can't say how many tokens it holds; pass position_ids"
        rule = self.found.unmasked if call.padding is None else self.found.masked
        if rule is None:
            return "this model works out missing position_ids in a way of its own; pass position_ids"
        mask = call.inputs if rule in _UNMASKED else call.padding
        if rule not in _UNMASKED and (not isinstance(mask, Tensor) or mask.dim() != 2):
            return "this model works out missing position_ids from a mask of [batch, tokens]; pass position_ids"
        filled = RULES[rule](mask.to(call.inputs.device), seen, tokens).expand(batch, -1)
        if filled.shape[1] != tokens:
            return "the attention mask is not as long as the cache and the call's tokens together"
        return filled.contiguous()

    def _ask(self) -> _Found:
        """Ask a part of the model that has every kind of its layers, as what is worked out before the layers does not
        depend on their number; the whole model where that part can't run."""
        found = _Found(None, None)
        for model in (_part(self.model), self.model):
            try:
                found = _rule_of(model)
                break
            except Exception:  # nor does the model's own forward take such calls, if the whole model is refused, too
                continue
        if self._agree is not None:  # what the first process found is what all did
            told = self._agree(f"{found.unmasked}|{found.masked}") or ""
            unmasked, _, masked = told.partition(": ")[2].partition("|")
            found = _Found(*(name if name in RULES else None for name in (unmasked, masked)))
        return found


def _part(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the first layers of `model`, as many as show every kind; it shares every module and weight."""
    stack = stack_of(model)
    if stack is None:
        return model
    length = 1 + max(map(stack.kinds.index, set(stack.kinds)))
    part: Any = templates.short_model(model, Template(stack, length))
    return part


@torch.no_grad()
def _rule_of(model: PreTrainedModel) -> _Found:
    ids = torch.randint(
        model.config.get_text_config().vocab_size, (3, sum(_STEPS)), generator=torch.Generator().manual_seed(0)
    ).to(model.device)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # on the left
    mask[1, _STEPS[0] - 2 : _STEPS[0]] = 0  # on the right
    return _Found(_rule(model, ids, None, _UNMASKED), _rule(model, ids, mask, tuple(RULES)))


def _rule(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, names: tuple[str, ...]) -> str | None:
    """The rule that gives a model the logits which it gives without positions."""
    own = _logits(model, ids, mask, None)
    apart: dict[str, float] = {}
    for name in names:
        apart[name] = _apart(own, _logits(model, ids, mask, name))
        if apart[name] == 0:
            break
    best = min(apart, key=lambda name: apart[name])
    return best if apart[best] <= EXACT.of(model.dtype) else None


def _logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, rule: str | None) -> list[Tensor]:
    """The logits of each step of some sequences, their positions filled in by a rule; by the model itself, if None."""
    with rotary_state_kept(model):  # of a rope whose tables change with the length each run is the first
        return _steps(model, ids, mask, rule)


def _steps(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, rule: str | None) -> list[Tensor]:
    cache = new_cache(model)
    found, seen = [], 0
    for tokens in _STEPS:
        stop = seen + tokens
        kwargs: dict[str, Any] = {} if mask is None else {"attention_mask": mask[:, :stop]}
        if rule is not None:
            kwargs["position_ids"] = RULES[rule](mask[:, :stop] if mask is not None else ids, seen, tokens).expand(
                len(ids), -1
            )
        kwargs[cache_argument(model)] = cache
        found.append(type(model).forward(model, input_ids=ids[:, seen:stop], use_cache=True, **kwargs).logits)
        seen = stop
    return found


def _apart(own: list[Tensor], filled: list[Tensor]) -> float:
    """How far logits are apart; infinitely where one is no number and the other is."""
    if any(not torch.equal(a.isnan(), b.isnan()) for a, b in zip(own, filled, strict=True)):
        return math.inf
    return max(distance(b.nan_to_num(), a.nan_to_num()) for a, b in zip(own, filled, strict=True))
