"""Forwards that somebody put on an instance, before compiling or after: kept, or refused with a reason; never lost."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from plain_nets import Net
from torch import Tensor, nn
from transformers import PreTrainedModel

import families
import glowplug

IDS = families.prompt(2, 5)
Wrap = Callable[[nn.Module], None]


def scaled(output: Any) -> Any:
    """An output that shows that a wrapper ran."""
    if isinstance(output, Tensor):
        return output * 1.5
    if isinstance(output, tuple):
        return (output[0] * 1.5, *output[1:])
    output.logits = output.logits * 1.5
    return output


def as_method(module: nn.Module) -> None:
    """As accelerate puts autocast around a forward."""
    original = module.forward
    function = getattr(original, "__func__", None)  # a compiled forward is no method

    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return scaled(original(*args, **kwargs) if function is None else function(self, *args, **kwargs))

    module.forward = types.MethodType(wrapper, module)


def as_closure(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda *args, **kwargs: scaled(original(*args, **kwargs))


def _run(original: Any, *args: Any, **kwargs: Any) -> Any:
    return scaled(original(*args, **kwargs))


def as_partial(module: nn.Module) -> None:
    module.forward = functools.partial(_run, module.forward)


WRAPS = [as_method, as_closure, as_partial]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("wrap", WRAPS, ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_on_the_model_before_compiling(wrap: Wrap, family: str) -> None:
    eager, model = families.build(family), families.build(family)
    plain = logits(eager)
    for one in (eager, model):
        wrap(one)
    expected = logits(eager)
    assert not torch.allclose(expected, plain)
    glowplug.compile(model, compiler="eager")
    assert torch.equal(logits(model), expected)
    text = [one.generate(IDS, max_new_tokens=4, do_sample=False) for one in (eager, model)]
    assert torch.equal(*text)
    assert glowplug.report(model).serving.startswith("eager: ")
    (fallback,) = glowplug.report(model).fallbacks
    assert "forward of its own" in fallback.reason and "0x" not in fallback.reason
    assert glowplug.compile(model, compiler="eager") is model  # again: still there
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)


def test_strict_refuses_a_forward_of_the_models_own() -> None:
    model = families.build("qwen3_moe")
    as_closure(model)
    glowplug.compile(model, compiler="eager", strict=True)
    with pytest.raises(glowplug.NotServableError, match="forward of its own"):
        logits(model)


@pytest.mark.parametrize("wrap", WRAPS, ids=lambda wrap: wrap.__name__)
def test_on_the_model_after_compiling(wrap: Wrap) -> None:
    """What lies around the compiled forward runs around it."""
    eager, model = families.build("qwen3_moe"), families.build("qwen3_moe")
    glowplug.compile(model, compiler="eager")
    logits(model)
    for one in (eager, model):
        wrap(one)
    torch.testing.assert_close(logits(model), logits(eager), rtol=1e-5, atol=1e-5)


PLACES: dict[str, Callable[[PreTrainedModel], list[nn.Module]]] = {
    "the decoder": lambda model: [model.model],
    "one layer": lambda model: [model.model.layers[3]],
    "each layer": lambda model: list(model.model.layers),
    "each attention": lambda model: [layer.self_attn for layer in model.model.layers],
    "each mlp": lambda model: [layer.mlp for layer in model.model.layers],
    "each experts": lambda model: [getattr(layer.mlp, "experts", layer.mlp) for layer in model.model.layers],
    "each norm": lambda model: [layer.input_layernorm for layer in model.model.layers],
    "each projection": lambda model: [layer.self_attn.q_proj for layer in model.model.layers],
    "the embedding": lambda model: [model.get_input_embeddings()],
    "the head": lambda model: [model.lm_head],
}


@functools.cache
def compiled(experts: str) -> PreTrainedModel:
    """A compiled model, whose submodules are wrapped and unwrapped again."""
    return glowplug.compile(families.build("qwen3_moe", layers=6), compiler="eager", experts=experts)


@pytest.fixture(scope="module", autouse=True)
def forget_models() -> Iterator[None]:
    """Keep none of them for the rest of the suite."""
    yield
    compiled.cache_clear()


@pytest.mark.parametrize("experts", ["inline", "opaque"])
@pytest.mark.parametrize("wrap", WRAPS, ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("place", [place for place in PLACES if place != "the decoder"])
def test_on_submodules(place: str, wrap: Wrap, experts: str) -> None:
    eager, model = (families.build("qwen3_moe", layers=6) for _ in range(2))
    plain = logits(eager)
    for one in (eager, model):
        for module in PLACES[place](one):
            wrap(module)
    expected = logits(eager)
    assert not torch.allclose(expected, plain)
    glowplug.compile(model, compiler="eager", experts=experts)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    late = compiled(experts)
    torch.testing.assert_close(logits(late), plain, rtol=1e-5, atol=1e-5)
    assert glowplug.report(late).serving == "program"
    for module in PLACES[place](late):
        wrap(module)
    try:
        torch.testing.assert_close(logits(late), expected, rtol=1e-5, atol=1e-5)
        assert glowplug.report(late).serving.startswith("eager: ")  # the program was made without
    finally:
        for module in PLACES[place](late):
            del module.forward
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).tolist() == (
        eager.generate(IDS, max_new_tokens=4, do_sample=False).tolist()
    )


@pytest.mark.parametrize("wrap", WRAPS, ids=lambda wrap: wrap.__name__)
def test_on_mixers_that_run_whole(wrap: Wrap) -> None:
    """Layers with states of their own run behind an op, by the forward that they have."""
    from transformers import MambaConfig, MambaForCausalLM

    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        config = MambaConfig(
            vocab_size=128, hidden_size=32, state_size=4, num_hidden_layers=6, time_step_rank=4, pad_token_id=0
        )
        return MambaForCausalLM(config).eval().requires_grad_(False)

    eager, model = make(), make()
    ids = IDS % 128
    with torch.no_grad():
        plain = eager(ids, use_cache=False).logits
        for one in (eager, model):
            for layer in one.backbone.layers:
                wrap(layer.mixer)
        expected = eager(ids, use_cache=False).logits
        assert not torch.allclose(expected, plain)
        glowplug.compile(model, compiler="eager")
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


# -- plain modules --


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).relu()


def net() -> Net:
    torch.manual_seed(0)
    return Net(Layer, 8).eval().requires_grad_(False)


@pytest.mark.parametrize("wrap", WRAPS, ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", ["the module", "one layer", "each layer", "each linear"])
def test_on_plain_modules(place: str, when: str, wrap: Wrap) -> None:
    eager, model = net(), net()
    x = torch.randn(3, 8)
    plain = eager(x)
    if when == "after":
        glowplug.compile(model, compiler="eager")
        assert torch.allclose(model(x), plain)
    for one in (eager, model):
        at = {
            "the module": [one],
            "one layer": [one.layers[4]],
            "each layer": list(one.layers),
            "each linear": [layer.linear for layer in one.layers],
        }
        for module in at[place]:
            wrap(module)
    expected = eager(x)
    assert not torch.allclose(expected, plain)
    if when == "before":
        glowplug.compile(model, compiler="eager")
    for _ in range(2):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    if when == "before":
        report = glowplug.report(model)
        assert report.serving == "program"
        if place == "the module":
            assert "forward of its own" in report.fallbacks[0].reason
        torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=1e-5, atol=1e-5)
