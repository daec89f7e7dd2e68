"""Stamping: the deep program is the model, for every family, whatever its weights; and what it looks like."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

import families
import glowplug
from glowplug.layers.stack import choose_template

DEPTHS = {
    "gpt_oss": 12,
    "glm4_moe": 10,
    "ernie4_5_vl_moe": 9,
    "qwen3_moe": 7,
    "mixtral": 7,
    "deepseek_v3": 10,
    "llama4": 18,
    "qwen3": 7,
}


def generate(model: PreTrainedModel, tokens: int = 16) -> Tensor:
    ids = families.prompt(2, 12)
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True)


def error(actual: Any, expected: Any) -> float:
    one, other = torch.stack(actual.logits), torch.stack(expected.logits)
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("experts", ["inline", "opaque"])
@pytest.mark.parametrize("family", DEPTHS)
def test_deep_models_are_stamped(family: str, experts: str) -> None:
    eager, model = (families.build(family, layers=DEPTHS[family]) for _ in range(2))
    glowplug.compile(model, compiler="eager", experts=experts, strict=True)
    expected, output = generate(eager), generate(model)
    report = glowplug.report(model)
    assert (report.strategy, report.fallbacks) == ("stamped", [])
    assert 2 <= report.template_layers < DEPTHS[family]
    assert torch.equal(output.sequences, expected.sequences)
    assert error(output, expected) < 1e-5
    assert report.pieces >= DEPTHS[family] + 1
    assert report.distinct_pieces <= 9


@pytest.mark.parametrize("experts", ["inline", "opaque"])
@pytest.mark.parametrize("family", DEPTHS)
def test_every_weight_is_bound_to_its_own_place(family: str, experts: str) -> None:
    """Stamped while all layers of a kind hold equal weights, so that no comparison of values can see a wrong binding;
    then every weight gets values of its own."""
    model = families.build(family, layers=DEPTHS[family])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.02)
    glowplug.compile(model, compiler="eager", experts=experts)
    generate(model, 2)
    assert glowplug.report(model).strategy == "stamped"
    source = families.build(family, seed=5, layers=DEPTHS[family])
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), source.parameters(), strict=True):
            parameter.copy_(other)
    assert error(generate(model), generate(source)) < 1e-5
    assert glowplug.report(model).fallbacks == []


def test_no_compilation_after_the_first_token() -> None:
    model = glowplug.compile(families.build("gpt_oss", layers=12), compiler="eager")
    generate(model, 1)
    before = (glowplug.report(model).programs, dict(counters["stats"]))
    for batch, tokens in ((1, 1), (8, 3), (3, 100), (1, 512), (2, 1)):
        model.generate(families.prompt(batch, tokens), max_new_tokens=3, do_sample=False)
    assert (glowplug.report(model).programs, dict(counters["stats"])) == before


@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe", "llama4", "deepseek_v3"])
def test_the_printed_program_is_the_program(family: str) -> None:
    model = glowplug.compile(families.build(family, layers=DEPTHS[family]), compiler="eager")
    ids = families.prompt(2, 9)
    with torch.no_grad():
        expected = model(ids).logits
    (served,) = model.forward.compilation.programs
    names: dict[str, Any] = dict(served.program.names)
    (source,) = glowplug.report(model).sources
    exec(source, names)
    object.__setattr__(served.program, "run", functools.partial(names["run"], tuple(served.program.slots.values())))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    assert source.count("\n") < 80
    assert "    for layer" in source and "# layers " in source


def test_depth_does_not_lengthen_the_program_or_the_trace() -> None:
    lines, nodes = set(), set()
    for depth in (8, 24, 48):
        model = glowplug.compile(families.build("gpt_oss", layers=depth), compiler="eager")
        with torch.no_grad():
            model(families.prompt(1, 3))
        report = glowplug.report(model)
        lines.add(report.sources[0].count("\n"))
        nodes.add((report.template_layers, report.distinct_pieces))
    assert len(lines) == len(nodes) == 1


def test_the_model_is_left_as_it_was() -> None:
    model = families.build("gpt_oss", layers=12)
    layers = model.model.layers
    before = {name: id(module) for name, module in model.named_modules()}
    glowplug.compile(model, compiler="eager")
    with torch.no_grad():
        model(families.prompt(1, 3))
    assert model.model.layers is layers and len(layers) == 12
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_shallow_models_are_traced_whole() -> None:
    model = glowplug.compile(families.build("gpt_oss", layers=4), compiler="eager", strict=True)
    with torch.no_grad():
        model(families.prompt(1, 3))
    report = glowplug.report(model)
    assert (report.strategy, report.template_layers, report.fallbacks) == ("hoisted", 0, [])


@pytest.mark.parametrize("options", [{"stamp": "off"}, {"identity": "ordered"}, {"identity": "baked"}])
def test_stamping_can_be_turned_off(options: dict[str, str]) -> None:
    model = glowplug.compile(families.build("qwen3", layers=7), compiler="eager", **options)
    with torch.no_grad():
        model(families.prompt(1, 3))
    assert glowplug.report(model).strategy == options.get("identity", "hoisted")
    assert glowplug.report(model).fallbacks == []


def test_without_verification() -> None:
    eager, model = (families.build("gpt_oss", layers=12) for _ in range(2))
    glowplug.compile(model, compiler="eager", verify="off")
    assert error(generate(model), generate(eager)) < 1e-5
    assert glowplug.report(model).strategy == "stamped"


@pytest.mark.parametrize(
    ("kinds", "length"),
    [
        ([0] * 36, 4),
        ([0, 1] * 18, 6),
        ([0, 0, 0] + [1] * 89, 6),
        ([0, 1, 0, 2] * 12, 12),
        ([0], None),
        ([0, 0], None),
        (list(range(12)), None),
        ([0] * 20 + [1], None),  # only the whole stack shows its last layer
    ],
)
def test_templates(kinds: list[int], length: int | None) -> None:
    assert choose_template(kinds) == length
    if length is not None:
        assert kinds[:length][-2:] == kinds[-2:]
