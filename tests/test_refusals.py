"""Calls that a compiled program can't serve run eager, say why once, and raise under `strict=True`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import families
import glowplug
from glowplug import NotServableError

IDS = families.prompt(2, 9)
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]] * 2)


@contextmanager
def training(model: PreTrainedModel) -> Iterator[None]:
    model.train()
    try:
        yield
    finally:
        model.eval()


@contextmanager
def config(model: PreTrainedModel, name: str) -> Iterator[None]:
    setattr(model.config, name, True)
    try:
        yield
    finally:
        setattr(model.config, name, False)


def nothing(_: PreTrainedModel) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Case:
    """A call that has to run eager."""

    reason: str
    kwargs: dict[str, Any]
    around: Callable[[PreTrainedModel], AbstractContextManager[Any]] = nothing
    grad: bool = False


CASES = {
    "grad mode": Case("grad mode", {}, grad=True),
    "output_hidden_states": Case("output_hidden_states", {"output_hidden_states": True}),
    "output_attentions": Case("output_attentions", {"output_attentions": True}),
    "output_router_logits": Case("output_router_logits", {"output_router_logits": True}),
    "labels": Case("labels", {"labels": IDS}),
    "training": Case("training mode", {}, training),
    "autocast": Case("autocast", {}, lambda _: torch.autocast("cpu", dtype=torch.bfloat16)),
    "config.output_hidden_states": Case("output_hidden_states", {}, lambda m: config(m, "output_hidden_states")),
    "config.output_router_logits": Case("output_router_logits", {}, lambda m: config(m, "output_router_logits")),
    "unknown argument": Case("'output_sizes'", {"output_sizes": 3}),
    "packed positions": Case("packed", {"position_ids": PACKED, "use_cache": False}),
}


CHANGED_CONFIG = ("config.output_hidden_states", "config.output_router_logits")
"""A config that was changed counts as a changed model, even when it was changed back: compile again."""


def run(forward: Any, case: Case, model: PreTrainedModel) -> Any:
    torch.manual_seed(0)
    with torch.set_grad_enabled(case.grad), case.around(model):
        return forward(IDS, **case.kwargs)


def served(model: PreTrainedModel) -> None:
    """A plain call is served, compiled, and right."""
    before = list(glowplug.report(model).fallbacks)
    with torch.no_grad():
        expected = type(model).forward(model, IDS).logits
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert glowplug.report(model).fallbacks == before


@pytest.fixture
def lenient(stored: dict[str, Any]) -> PreTrainedModel:
    return glowplug.compile(families.build("gpt_oss", layers=2), verify="off", **stored)


@pytest.fixture
def strict(stored: dict[str, Any]) -> PreTrainedModel:
    return glowplug.compile(families.build("gpt_oss", layers=2), verify="off", strict=True, **stored)


@pytest.mark.parametrize("name", CASES)
def test_runs_eager_and_says_so_once(name: str, lenient: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    case, report = CASES[name], glowplug.report(lenient)
    served(lenient)
    assert report.fallbacks == []
    expected = run(type(lenient).forward.__get__(lenient), case, lenient)
    with caplog.at_level(logging.WARNING, logger="glowplug"):
        outputs = [run(lenient, case, lenient) for _ in range(3)]
    for output in outputs:
        assert list(output) == list(expected)  # hidden states, loss, ... are there when asked for
        assert torch.equal(output.logits, expected.logits)
    (fallback,) = report.fallbacks
    assert case.reason in fallback.reason
    assert len([record for record in caplog.records if record.name == "glowplug"]) == 1
    if name not in CHANGED_CONFIG:
        served(lenient)  # and afterwards the program serves again
        assert len(report.fallbacks) == 1


@pytest.mark.parametrize("name", CASES)
def test_strict_raises(name: str, strict: PreTrainedModel) -> None:
    case = CASES[name]
    served(strict)
    with pytest.raises(NotServableError) as caught:
        run(strict, case, strict)
    assert case.reason in str(caught.value)
    assert "strict=True" in str(caught.value)
    if name not in CHANGED_CONFIG:
        served(strict)
    assert glowplug.report(strict).fallbacks == []


def test_contents_of_what_was_asked_for(lenient: PreTrainedModel) -> None:
    with torch.no_grad():
        assert len(lenient(IDS, output_hidden_states=True).hidden_states) == 3
        assert lenient(IDS, output_attentions=True).attentions is not None
        assert lenient(IDS, labels=IDS).loss > 0
        assert len(lenient(IDS, output_router_logits=True).router_logits) == 2


def test_gradients_are_eagers() -> None:
    model, twin = families.build("gpt_oss", layers=2), families.build("gpt_oss", layers=2)
    glowplug.compile(model, compiler="eager")
    served(model)
    for one in (model, twin):
        one(IDS, labels=IDS).loss.backward()
    pairs = list(zip(model.named_parameters(), twin.parameters(), strict=True))
    assert sum(parameter.grad is not None for (_, parameter), _ in pairs) > 10
    for (name, parameter), other in pairs:
        assert (parameter.grad is None) == (other.grad is None), name
        if other.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, msg=name)
    # And one step of an optimiser, in place, is followed by the program.
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    served(model)


def test_gradients_of_input_embeddings() -> None:
    """Frozen weights, but an input that needs its gradient: prompt tuning."""
    model = families.build("gpt_oss", layers=2).requires_grad_(False)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(IDS)
    (expected,) = torch.autograd.grad(model(inputs_embeds=embeds.requires_grad_()).logits.sum(), embeds)
    glowplug.compile(model, compiler="eager")
    (actual,) = torch.autograd.grad(model(inputs_embeds=embeds).logits.sum(), embeds)
    torch.testing.assert_close(actual, expected)
    assert "grad" in glowplug.report(model).fallbacks[0].reason


def test_frozen_weights_are_served_in_grad_mode() -> None:
    model = glowplug.compile(families.build("gpt_oss", layers=2).requires_grad_(False), compiler="eager", strict=True)
    output = model(IDS).logits
    assert not output.requires_grad
    assert torch.equal(output, type(model).forward(model, IDS).logits)
    model.requires_grad_(True)
    with pytest.raises(NotServableError, match="grad mode"):
        model(IDS)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, output)


def test_autocast_of_another_device_does_not_matter(lenient: PreTrainedModel) -> None:
    with torch.autocast("cpu", enabled=False):
        served(lenient)


def test_generate_with_hidden_states(lenient: PreTrainedModel) -> None:
    eager = families.build("gpt_oss", layers=2)
    kwargs = {"max_new_tokens": 4, "do_sample": False, "output_hidden_states": True, "return_dict_in_generate": True}
    expected, output = eager.generate(IDS, **kwargs), lenient.generate(IDS, **kwargs)
    assert torch.equal(output.sequences, expected.sequences)
    for one, other in zip(output.hidden_states, expected.hidden_states, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "wrong", [{}, {"input_ids": IDS, "inputs_embeds": torch.zeros(2, 9, 64)}], ids=["none", "both"]
)
def test_wrong_calls_raise_the_models_own_error(wrong: dict[str, Any], lenient: PreTrainedModel) -> None:
    with torch.no_grad():
        with pytest.raises(Exception) as expected:
            type(lenient).forward(lenient, **wrong)
        with pytest.raises(type(expected.value)) as actual:
            lenient(**wrong)
    assert str(actual.value) == str(expected.value)


def test_an_error_in_a_call_leaves_the_program_usable(lenient: PreTrainedModel) -> None:
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError)):
        lenient(torch.full((1, 3), families.VOCAB + 5))
    assert glowplug.current_context() is None
    served(lenient)


def test_compile_in_training_mode_then_eval() -> None:
    model = families.build("gpt_oss", layers=2).train()
    glowplug.compile(model, compiler="eager")
    with torch.no_grad():
        model(IDS)
    assert "training mode" in glowplug.report(model).fallbacks[0].reason
    served(model.eval())
    assert glowplug.report(model).programs == 1
