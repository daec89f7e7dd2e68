"""Models whose layers mix tokens by states of their own: linear attention, state space, short convolution."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import families
import glowplug
from glowplug.bench.families import build_family
from glowplug.errors import CaptureError, NotServableError
from glowplug.frontends.hf.discover import attention_layers, mixer_layers, token_mixers
from glowplug.layers.context import ForwardContext, forward_context
from glowplug.ops.arguments import NOTHING, decode, encode
from glowplug.ops.layer_op import known_layer_ops


def pair(kind: str, depth: int, **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """An eager model and its compiled twin."""
    eager = build_family(kind, depth)
    compiled = copy.deepcopy(eager)
    return eager, glowplug.compile(compiled, compiler="eager", **options)


def generated(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    output: Any = model.generate(ids, **{"max_new_tokens": 24, "do_sample": False, **kwargs})
    return output


@pytest.mark.parametrize("experts", ["inline", "opaque"])
def test_linear_attention_is_stamped_and_generates_as_eager(experts: str) -> None:
    eager, compiled = pair("qwen3_next", 16, experts=experts)
    for ids in (families.prompt(1, 9), families.prompt(3, 4)):
        assert torch.equal(generated(eager, ids), generated(compiled, ids))
    report = glowplug.report(compiled)
    assert report.fallbacks == []
    assert report.strategy == "stamped"
    assert report.template_layers < 16
    assert report.programs == 1


def test_padding_beams_and_a_second_turn() -> None:
    eager, compiled = pair("qwen3_next", 8)
    ids, mask = families.prompt(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    assert torch.equal(*(generated(m, ids, attention_mask=mask) for m in (eager, compiled)))
    unpadded = generated(compiled, ids)
    assert not torch.equal(unpadded, generated(compiled, ids, attention_mask=mask))
    assert torch.equal(*(generated(m, ids, num_beams=2) for m in (eager, compiled)))
    turns = []
    for model in (eager, compiled):
        first = generated(model, ids, return_dict_in_generate=True)
        more = torch.cat([first.sequences, families.prompt(2, 3)], 1)
        turns.append(generated(model, more, past_key_values=first.past_key_values))
    assert torch.equal(*turns)
    assert glowplug.report(compiled).fallbacks == []


def test_mixers_are_told_from_attention() -> None:
    model = build_family("qwen3_next", 4)
    assert [name.rpartition(".")[2] for name in mixer_layers(model)] == ["linear_attn"] * 3
    assert [name.rpartition(".")[2] for name in attention_layers(model)] == ["self_attn"]
    assert [name.split(".")[2] for name in token_mixers(model)] == ["0", "1", "2", "3"]
    assert mixer_layers(families.build("gpt_oss")) == {}


class Doubling(torch.nn.Module):
    """Answers with what it is told to."""

    layer_idx = 0

    def forward(self, hidden_states: Tensor, how: str | None = None, pair: Any = None, cache: Any = None) -> Any:
        self.seen = pair, cache
        return {"wide": torch.cat([hidden_states] * 2, -1), "same": hidden_states}.get(str(how), hidden_states * 2)


def test_the_op_hands_over_everything_and_checks_the_output() -> None:
    layer, states = Doubling(), torch.randn(1, 3, 4)
    run = next(op for op in known_layer_ops() if op.name == "glowplug::mixer").fn
    tensors, options = encode({"pair": (states, states), "cache": 3.5}, ())
    with forward_context(ForwardContext(None, "the cache", True)):
        output = run(layer, states, None, tensors, options.replace("cache=3.5", "cache=#"))
    assert torch.equal(output, states * 2)
    assert layer.seen == ((tensors[0], tensors[1]), "the cache")
    output = run(layer, states, None, [], "how='same'")
    assert torch.equal(output, states) and output is not states
    with pytest.raises(NotServableError, match=r"Doubling gave \(1, 3, 8\)"):
        run(layer, states, None, [], "how='wide'")


def test_arguments_there_and_back() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    given = {"x": a, "pair": (b, c), "one": (a,), "flag": True, "none": None, "scale": 0.5}
    tensors, options = encode(given)
    assert decode(options, tensors) == given
    assert decode("", []) == {}
    nested = {"masks": {"causal": a, "conv": b}, "rope": {"main": (a, b), "other": (c, 1.5, None)}}
    tensors, options = encode(nested)
    assert options == "masks={'causal': @0,'conv': @1,};rope={'main': (@2,@3,),'other': (@4,1.5,None,),}"
    assert decode(options, tensors) == nested
    assert decode(options, [a, None, *tensors[2:]])["masks"] == {"causal": a, "conv": None}  # type: ignore[list-item]
    with pytest.raises(NotServableError, match="a layer got no x, which its trace had"):
        decode("x=@0", [NOTHING])
    with pytest.raises(CaptureError, match="a layer got what of a type"):
        encode({"what": object()})
