"""The `position_ids` that a call leaves out. A program takes them as an argument. Models fill them in by different
rules, by counting tokens or from the attention mask; running the model's own forward shows which rule it has.
"""

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
"""`rule(mask, seen, tokens)`: positions `[batch or 1, tokens]` of a step after `seen` tokens."""


def _counted(mask: Tensor, seen: Any, tokens: int) -> Tensor:
    return torch.arange(tokens, device=mask.device).unsqueeze(0) + seen


def _from_mask(mask: Tensor, seen: Any, tokens: int, at_padding: int | None) -> Tensor:
    positions: Tensor = mask.cumsum(dim=1)
    if at_padding is None:  # padding gets -1
        return (positions * mask - 1).long()[:, seen:]
    return (positions.long() - 1).masked_fill(mask == 0, at_padding)[:, seen:]


RULES: dict[str, Rule] = {
    "counted": _counted,
    "counted anew": lambda mask, seen, tokens: _counted(mask, 0, tokens),
    "from the mask": lambda mask, seen, tokens: _from_mask(mask, seen, tokens, None),
    "from the mask, 0 at padding": lambda mask, seen, tokens: _from_mask(mask, seen, tokens, 0),
    "from the mask, 1 at padding": lambda mask, seen, tokens: _from_mask(mask, seen, tokens, 1),
}
"""The rules of transformers' models, the most common first."""
_UNMASKED = ("counted", "counted anew")
"""The rules that need no mask."""

_STEPS = (5, 2)
"""Tokens of each step of the calls by which a model's rules are found."""


@dataclass(frozen=True)
class PositionRules:
    """Names of the rules by which a model fills in missing positions; None for a rule that glowplug does not know.

    Attributes:
        unmasked: the rule for calls without a mask.
        masked: the rule for calls with one.
    """

    unmasked: str | None
    masked: str | None


class Positions:
    """Fills in the positions that calls of a model leave out.

    Args:
        model: the model; its forward runs when its rules are first needed.
        agree: if several processes run the model together, makes one process's result that of all.
    """

    def __init__(self, model: PreTrainedModel, agree: Callable[[str | None], str | None] | None = None) -> None:
        self.model = model
        self._agree = agree
        self._rules: PositionRules | None = None

    def fill(self, call: HfCall) -> Tensor | str:
        """The positions that the model would give a call, `[batch, tokens]`, or the reason why they are not known."""
        batch, tokens = call.inputs.shape[:2]
        seen = seen_tokens(call.cache)
        if seen is None:
            return "the cache can't say how many tokens it holds; pass position_ids"
        rule = self.rules.unmasked if call.padding is None else self.rules.masked
        if rule is None:
            return "this model works out missing position_ids in a way of its own; pass position_ids"
        mask = call.inputs if rule in _UNMASKED else call.padding
        if rule not in _UNMASKED and (not isinstance(mask, Tensor) or mask.dim() != 2):
            return "this model works out missing position_ids from a mask of [batch, tokens]; pass position_ids"
        filled = RULES[rule](mask.to(call.inputs.device), seen, tokens).expand(batch, -1)
        if filled.shape[1] != tokens:
            return "the attention mask is not as long as the cache and the call's tokens together"
        return filled.contiguous()

    @property
    def rules(self) -> PositionRules:
        """The model's rules."""
        if self._rules is None:
            self._rules = self._find_rules()
        return self._rules

    def _find_rules(self) -> PositionRules:
        """The number of layers has no influence on positions, so it is enough to run as many as show every kind. If
        that fails, the whole model runs."""
        rules = PositionRules(None, None)
        for model in (_part(self.model), self.model):
            try:
                rules = _rules_of(model)
                break
            except Exception:  # if the whole model fails, too, its own forward takes no such calls
                continue
        if self._agree is not None:  # the text, with the number of the first process in front of it
            text = self._agree(f"{rules.unmasked}|{rules.masked}") or ""
            unmasked, _, masked = text.partition(": ")[2].partition("|")
            rules = PositionRules(*(name if name in RULES else None for name in (unmasked, masked)))
        return rules


def _part(model: PreTrainedModel) -> PreTrainedModel:
    """The model with only its first layers, as many as show every kind; it shares modules and weights."""
    stack = stack_of(model)
    if stack is None:
        return model
    length = 1 + max(map(stack.kinds.index, set(stack.kinds)))
    part: Any = templates.short_model(model, Template(stack, length))
    return part


@torch.no_grad()
def _rules_of(model: PreTrainedModel) -> PositionRules:
    ids = torch.randint(
        model.config.get_text_config().vocab_size, (3, sum(_STEPS)), generator=torch.Generator().manual_seed(0)
    ).to(model.device)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # on the left
    mask[1, _STEPS[0] - 2 : _STEPS[0]] = 0  # on the right
    return PositionRules(_rule(model, ids, None, _UNMASKED), _rule(model, ids, mask, tuple(RULES)))


def _rule(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, names: tuple[str, ...]) -> str | None:
    """The rule whose positions give the same logits as none at all."""
    own = _logits(model, ids, mask, None)
    distances: dict[str, float] = {}
    for name in names:
        distances[name] = _distance(own, _logits(model, ids, mask, name))
        if distances[name] == 0:
            break
    best = min(distances, key=lambda name: distances[name])
    return best if distances[best] <= EXACT.of(model.dtype) else None


def _logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, rule: str | None) -> list[Tensor]:
    """The logits of each step, with positions by a rule; by the model itself if the rule is None."""
    cache = new_cache(model)
    logits, seen = [], 0
    with rotary_state_kept(model):  # each run starts with the same tables
        for tokens in _STEPS:
            stop = seen + tokens
            kwargs: dict[str, Any] = {} if mask is None else {"attention_mask": mask[:, :stop]}
            if rule is not None:
                positions = RULES[rule](mask[:, :stop] if mask is not None else ids, seen, tokens)
                kwargs["position_ids"] = positions.expand(len(ids), -1)
            kwargs[cache_argument(model)] = cache
            logits.append(type(model).forward(model, input_ids=ids[:, seen:stop], use_cache=True, **kwargs).logits)
            seen = stop
    return logits


def _distance(own: list[Tensor], filled: list[Tensor]) -> float:
    """The largest distance between logits; infinite if NaNs are in different places."""
    if any(not torch.equal(a.isnan(), b.isnan()) for a, b in zip(own, filled, strict=True)):
        return math.inf
    return max(distance(b.nan_to_num(), a.nan_to_num()) for a, b in zip(own, filled, strict=True))
