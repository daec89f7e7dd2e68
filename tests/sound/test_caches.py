"""What glowplug asks of a cache can be refused by it. Where the plain model still answers, so does the compiled one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
)

import families
import glowplug

SIZES: dict[str, Any] = {"vocab_size": families.VOCAB, "hidden_size": 32, "num_hidden_layers": 8, "pad_token_id": 0}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
MAMBA2: dict[str, Any] = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}
JAMBA: dict[str, Any] = {
    "mamba_d_state": 8,
    "num_experts": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "use_mamba_kernels": False,
}
LFM2 = ["conv", "full_attention"] * 4

STATES: dict[str, Callable[[], PreTrainedModel]] = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=8)),
    "mamba2": lambda: Mamba2ForCausalLM(Mamba2Config(**SIZES, **MAMBA2)),
    "falcon_mamba": lambda: FalconMambaForCausalLM(FalconMambaConfig(**SIZES, state_size=8)),
}
"""Models whose caches hold no keys at all."""
HYBRIDS: dict[str, Callable[[], PreTrainedModel]] = {
    "jamba": lambda: JambaForCausalLM(JambaConfig(**SIZES, **HEADS, **JAMBA)),
    "lfm2": lambda: Lfm2ForCausalLM(Lfm2Config(**SIZES, **HEADS, layer_types=LFM2)),
}
"""Models whose first layer holds none."""


def pair(made: PreTrainedModel, **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model and its compiled twin."""
    made.eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return made, glowplug.compile(copy.deepcopy(made), compiler="eager", **options)


def cache_of(output: Any) -> Any:
    return output.get("cache_params") if "cache_params" in output else output.get("past_key_values")


def same(eager: PreTrainedModel, twin: PreTrainedModel, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Both answer a call equally; their answers."""
    with torch.no_grad():
        expected, found = (model(*args, **copy.deepcopy(kwargs)) for model in (eager, twin))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert (cache_of(found) is None) == (cache_of(expected) is None)
    return expected, found


@pytest.mark.parametrize("name", [*STATES, *HYBRIDS])
def test_every_form_of_call_of_models_that_keep_states(name: str) -> None:
    eager, twin = pair({**STATES, **HYBRIDS}[name]())
    ids, mask = families.prompt(2, 9), torch.ones(2, 9, dtype=torch.long)
    right = mask.clone()
    mask[0, :4], right[1, 6:] = 0, 0
    same(eager, twin, ids)
    same(eager, twin, ids, use_cache=False)
    same(eager, twin, ids, use_cache=True)
    same(eager, twin, ids[:, :1])
    for padded in (mask, right, torch.ones_like(mask)):
        same(eager, twin, ids, attention_mask=padded)
        same(eager, twin, ids, attention_mask=padded, use_cache=False)
    outputs = same(eager, twin, ids)
    argument = "cache_params" if name in STATES else "past_key_values"
    for _ in range(3):
        with torch.no_grad():
            outputs = tuple(
                model(ids[:, :1], **{argument: cache_of(output)})
                for model, output in zip((eager, twin), outputs, strict=True)
            )
        torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-4, atol=1e-4)
    report = glowplug.report(twin)
    assert report.fallbacks == []
    assert report.strategy == "stamped"


@pytest.mark.parametrize("name", [*STATES, *HYBRIDS])
def test_generate_of_models_that_keep_states(name: str) -> None:
    eager, twin = pair({**STATES, **HYBRIDS}[name]())
    ids, mask = families.prompt(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    for given in ({}, {"attention_mask": mask}, {"attention_mask": mask, "num_beams": 2}, {"use_cache": False}):
        tokens = [model.generate(ids, max_new_tokens=6, do_sample=False, **given) for model in (eager, twin)]
        assert torch.equal(*tokens)
    assert glowplug.report(twin).fallbacks == []


def test_rwkv_answers_and_says_why_it_runs_eager() -> None:
    model = RwkvForCausalLM(RwkvConfig(vocab_size=families.VOCAB, hidden_size=32, num_hidden_layers=4, rescale_every=0))
    eager, twin = pair(model)
    same(eager, twin, families.prompt(2, 5))
    assert "state" in glowplug.report(twin).fallbacks[0].reason


class Shy(DynamicCache):
    """A cache that answers no question, and holds whatever it is given."""

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        raise RuntimeError("not telling")

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        raise RuntimeError("not telling")

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        raise RuntimeError("not telling")

    @property
    def is_initialized(self) -> bool:
        raise RuntimeError("not telling")


def test_a_cache_that_refuses_every_question() -> None:
    """With a mask of four dims and positions, the plain model asks none."""
    eager, twin = pair(families.build("qwen3"))
    ids, square = families.prompt(1, 9), torch.ones(9, 9).tril().bool()
    caches: list[Any] = [Shy(config=model.config) for model in (eager, twin)]
    for seen, stop in ((0, 6), (6, 7), (7, 9)):
        mask = square[seen:stop, :stop].expand(1, 1, -1, -1)
        given = {"attention_mask": mask, "position_ids": torch.arange(seen, stop).unsqueeze(0), "use_cache": True}
        with torch.no_grad():
            expected, found = (
                model(ids[:, seen:stop], past_key_values=cache, **given).logits
                for model, cache in zip((eager, twin), caches, strict=True)
            )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    glowplug.settle(twin)


def test_what_the_plain_model_refuses_is_refused_alike() -> None:
    eager, twin = pair(families.build("qwen3"))
    for model in (eager, twin):
        with torch.no_grad(), pytest.raises(RuntimeError, match="not telling"):
            model(families.prompt(1, 9), past_key_values=Shy(config=model.config))


def test_a_cache_that_is_not_to_be_used() -> None:
    eager, twin = pair(families.build("qwen3"))
    ids = families.prompt(2, 9)
    outputs: list[Tensor] = []
    for model in (eager, twin):
        with torch.no_grad():
            first = model(ids)
            second = model(ids, past_key_values=first.past_key_values, use_cache=False)
        outputs.append(second.logits)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
