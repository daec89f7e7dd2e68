"""Before a program serves: one comparison with the model's own forward, on a small seeded input and caches of its own.

It covers what structure alone can't prove: that one capture serves a prefill and a decode step; that masks reach the
right layers, and are the model's own within a window and beyond; that the model's output has nothing besides logits and
the cache; and, for a stamped program, that no layer beyond the template does something that the template does not show.
That last question is asked of the program with uncompiled pieces, which does the same arithmetic as eager and so may
differ by next to nothing.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from glowplug.closeness import distance
from glowplug.errors import GlowplugError, NotServableError
from glowplug.hf.caches import new_cache, seen_tokens
from glowplug.hf.call import Call, Signature, cache_argument, read_call
from glowplug.hf.windows import WINDOW, with_short_windows
from glowplug.reasons import said

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest ||program - eager|| / ||eager|| by dtype, compiled pieces. Half precision: 0.5.

Rounding grows from layer to layer, and where two experts are nearly tied it decides between them: 0.11 after 36 layers
of random weights in bfloat16, 0.7 after 92, as much as other compilers give; a wrong layer gives about 1. That the
layers are the right ones is proved more closely by the uncompiled pieces, and beyond the tolerance a program is asked
piece by piece, see `Candidate.by_pieces`."""
_EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
"""The same for uncompiled pieces. Half precision: 0.01."""
Agree = Callable[[str | None], str | None]
Classes = Sequence[tuple[int, tuple[int, ...]]]
"""(sequences, tokens of each step) of each comparison."""
CLASSES: Classes = ((3, (3, 1)), (1, (1, 3)))
"""Several sequences and one, several tokens and one, an empty cache and a filled. Several are padded on the left and on
the right, and have positions as `generate` makes them; one has neither mask nor positions."""
_BEYOND_A_WINDOW = (2 * WINDOW - 1, 1)
"""Tokens of each step of the first comparison of a model with windows: some lie within, some beyond."""
GLANCE: Classes = ((1, (3,)),)
"""For a program that an earlier process compared in every class: is it this model's?"""


@dataclass(frozen=True)
class Candidate:
    """A program to compare with eager.

    Attributes:
        run: serves a call.
        exact: whether its pieces are uncompiled.
        by_pieces: serves a call with uncompiled pieces, and says which compiled piece differs from its uncompiled form
            on the same inputs, see `glowplug.program.try_pieces`. It may say that there are no uncompiled ones (None).
    """

    run: Callable[[Call], Any]
    exact: bool = False
    by_pieces: Callable[[Call], tuple[Any, str | None] | None] | None = None


@dataclass(frozen=True)
class Problem:
    """Why a program must not serve.

    Attributes:
        reason: in words.
        call: the call that showed it, with a cache of the steps before it, and the same as arguments of the model's
            own forward; None when no logits were compared.
        model: the model whose forward it is: the one compared, or its twin with short windows.
    """

    reason: str
    call: tuple[Call, dict[str, Any]] | None = None
    model: PreTrainedModel | None = None


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


def compare(
    model: PreTrainedModel,
    call: Call,
    candidates: Sequence[Candidate],
    on_output: Callable[[type], None],
    classes: Classes = CLASSES,
    agree: Agree | None = None,
    unsaid: bool = False,
) -> Problem | None:
    """Compare the logits of short sequences, in every class of sizes; padding on both sides; all logits and only the
    last.

    Args:
        model: the model; its own forward is run.
        call: a call that the programs are to serve; its signature is kept to.
        candidates: the programs. Exact ones are compared in the first class only.
        on_output: is told the class of the model's output.
        classes: the sizes to compare.
        agree: of a model that several processes run together: makes what one finds the finding of all.
        unsaid: whether one sequence may be given neither mask nor positions.

    Returns:
        Why a program must not serve, or None.
    """
    comparison = _Comparison(model, call, on_output, agree, unsaid)
    with torch.no_grad():
        for number, (batch, steps) in enumerate(classes):
            chosen = [candidate for candidate in candidates if number == 0 or not candidate.exact]
            in_windows = number == 0 and len(steps) > 1  # a glance looks at none
            problem = (comparison.in_windows if in_windows else comparison.in_steps)(chosen, batch, steps)
            if problem is not None:
                return problem
    return None


@dataclass(frozen=True)
class _Comparison:
    """What every comparison of a model has in common; see `compare`."""

    model: PreTrainedModel
    call: Call
    on_output: Callable[[type], None]
    agree: Agree | None
    unsaid: bool

    def in_windows(self, candidates: Sequence[Candidate], batch: int, steps: tuple[int, ...]) -> Problem | None:
        """Compare with a short window, if the model has one and its forward can do it."""
        try:
            twin = with_short_windows(self.model)
            if twin is not None:
                problem = replace(self, model=twin).in_steps(candidates, batch, _BEYOND_A_WINDOW)
            else:
                problem = None
        except Exception:  # no other window than its own fits the model
            twin, problem = None, None
        if twin is not None and problem is None:
            return None
        own = self.in_steps(candidates, batch, steps)
        if own is None and problem is not None:
            return replace(problem, reason=f"{problem.reason}, with a window of {WINDOW} tokens")
        return own

    def in_steps(self, candidates: Sequence[Candidate], batch: int, steps: tuple[int, ...]) -> Problem | None:
        """Compare the logits of each step of some sequences."""
        model, call = self.model, self.call
        signature = call.signature
        whole, mask, positions = _sequence(model, call, batch, steps)
        if batch == 1 and self.unsaid:
            mask = positions = None
        expected_cache, name = new_cache(model), cache_argument(model)
        keeps_keys = seen_tokens(expected_cache) is not None
        caches = [new_cache(model) for _ in candidates]
        start = 0
        for step in steps:
            stop = start + step
            kwargs: dict[str, Any] = {
                "inputs_embeds" if signature.embeds else "input_ids": whole[:, start:stop].contiguous(),
                "use_cache": True,
            }
            if mask is not None and (keeps_keys or start == 0):  # as generate does
                kwargs["attention_mask"] = mask[:, :stop]
            if positions is not None:
                kwargs["position_ids"] = positions[..., start:stop].contiguous()
            if signature.keeps and start > 0:
                kwargs["logits_to_keep"] = 1
            before = copy.deepcopy(expected_cache)
            try:
                expected = type(model).forward(model, **kwargs, **{name: expected_cache})
            except Exception as exc:
                return Problem(f"the model's own forward raised {type(exc).__name__}: {str(exc)[:200]}")
            extra = [found for found in expected if found not in ("logits", name)]
            if extra:
                return Problem(
                    f"the model's output carries {', '.join(extra)}, which the compiled program does not compute"
                )
            self.on_output(type(expected))
            what = f"{batch} x {step} tokens after {start}"
            for candidate, cache in zip(candidates, caches, strict=True):
                problem = self._ask(candidate, kwargs, cache, before, expected.logits, what)
                if problem is not None:
                    return problem
            start = stop
        return None

    def _ask(
        self, candidate: Candidate, kwargs: dict[str, Any], cache: Any, before: Any, expected: Tensor, what: str
    ) -> Problem | None:
        """Compare the logits of one call.

        Args:
            candidate: the program.
            kwargs: the call, but for its cache.
            cache: the candidate's.
            before: the model's own, as it was before the call.
            expected: the model's own logits.
            what: the call, in words.
        """
        agree = self.agree
        ready = read_call(self.model, (), {**kwargs, cache_argument(self.model): cache})
        if isinstance(ready, str):
            return Problem(ready)
        logits, reason = _run(candidate, ready, expected, what, raises=agree is None)
        compared = logits is not None
        if agree is not None:
            reason = agree(reason)
            compared = reason is None or agree(None if compared else "nothing to compare") is None
        if reason is not None and compared and candidate.by_pieces is not None:
            ready = read_call(self.model, (), {**kwargs, cache_argument(self.model): copy.deepcopy(before)})
            assert not isinstance(ready, str)
            reason = _ask_pieces(candidate.by_pieces, ready, expected, what, reason)
            reason = agree(reason) if agree is not None else reason
        if reason is None or not compared or agree is not None:
            return Problem(reason) if reason is not None else None
        ready = read_call(self.model, (), {**kwargs, cache_argument(self.model): copy.deepcopy(before)})
        assert not isinstance(ready, str)
        return Problem(reason, (ready, {**kwargs, cache_argument(self.model): before}), self.model)


def _run(
    candidate: Candidate, call: Call, expected: Tensor, what: str, *, raises: bool
) -> tuple[Tensor | None, str | None]:
    """A program's logits, if it gives any, and why they are not those expected, or None. With `raises`, errors of
    glowplug's own but `NotServableError` are raised."""
    try:
        logits: Tensor = candidate.run(call).logits
    except NotServableError as exc:
        return None, str(exc)
    except Exception as exc:
        if isinstance(exc, GlowplugError) and raises:
            raise
        return None, f"the program raised {said(exc)}"
    return logits, _differs(logits, expected, what, candidate.exact)


def _ask_pieces(
    by_pieces: Callable[[Call], tuple[Any, str | None] | None], call: Call, expected: Tensor, what: str, reason: str
) -> str | None:
    """Whether each compiled piece does what its uncompiled form does, and with those the logits are the expected; then
    what made the program's own logits differ is rounding. Returns why not, or None."""
    try:
        found = by_pieces(call)
    except Exception as exc:
        return f"{reason}; piece by piece it raised {said(exc)}"
    if found is None:
        return reason
    output, problem = found
    if problem is not None:
        return f"{reason}; {problem}"
    return _differs(output.logits, expected, what, exact=True)


def _sequence(
    model: PreTrainedModel, call: Call, batch: int, steps: tuple[int, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Seeded text, its mask and its positions. Of several sequences the first is padded on the left, the second on the
    right of its first step, and the third behind it."""
    signature: Signature = call.signature
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


def _allowed(dtype: torch.dtype, exact: bool) -> float:
    return _EXACT.get(dtype, 0.01) if exact else _TOLERANCE.get(dtype, 0.5)


def _differs(actual: Tensor, expected: Tensor, what: str, exact: bool) -> str | None:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"the compiled program gives {tuple(actual.shape)} {actual.dtype}, eager {tuple(expected.shape)}"
    error, allowed = distance(actual, expected), _allowed(expected.dtype, exact)
    if not error <= allowed:
        return f"the compiled program differs from eager by {error:.1e} (allowed {allowed:.0e}) for {what}"
    return None
