"""The compiled bodies of opaque experts: right, used where it is faster, never inherited, never stale."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import families
import glowplug
from glowplug.bodies import trial
from glowplug.bodies.body import Body, Verdict
from glowplug.bodies.form import Argument, CallForm
from glowplug.bodies.group import Group
from glowplug.compilers.eager import EagerCompiler
from storing import StoringGraphs

OPAQUE = ["gpt_oss", "glm4_moe", "qwen3_moe", "mixtral", "deepseek_v3", "llama4"]


class Uncompiled(EagerCompiler):
    """Runs pieces uncompiled, without saying so: bodies are made and tried as with a real compiler."""

    name = "uncompiled"


@pytest.fixture
def always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_FASTER", 1e9)


def compiled(family: str, **options: Any) -> Any:
    model = families.build(family)
    glowplug.compile(model, experts="opaque", compiler=Uncompiled(), **options)
    return model


def with_bodies(model: nn.Module) -> list[nn.Module]:
    in_use = model.forward.compilation.bodies.every
    return [module for module in model.modules() if id(module) in in_use]


@pytest.mark.usefixtures("always_faster")
@pytest.mark.parametrize("family", OPAQUE)
def test_equal_to_eager(family: str) -> None:
    eager, model = families.build(family), compiled(family, inside="compiled")
    ids = families.prompt(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, eager(ids).logits, rtol=1e-5, atol=1e-5)
        assert with_bodies(model)
        torch.testing.assert_close(model(ids).logits, eager(ids).logits, rtol=1e-5, atol=1e-5)
    expected, output = (m.generate(ids, max_new_tokens=16, do_sample=False) for m in (eager, model))
    assert torch.equal(output, expected)
    report = glowplug.report(model)
    assert report.fallbacks == []
    assert sum(len(inside.layers) for inside in report.insides) == len(with_bodies(model))
    assert "inside of glowplug::moe_forward" in str(report)


@pytest.mark.usefixtures("always_faster")
@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe"])
def test_every_layer_is_bound_to_its_own_weights(family: str) -> None:
    model, eager = compiled(family, inside="compiled"), families.build(family)
    ids = families.prompt(2, 5)
    with torch.no_grad():
        model(ids)
        bodies = with_bodies(model)
        names = [name for name, module in model.named_modules() if module in bodies]
        assert len(names) > 1
        for number, name in enumerate(names):
            for one in (model, eager):
                for parameter in one.get_submodule(name).parameters():
                    parameter.mul_(1 + 0.1 * (number + 1))
        torch.testing.assert_close(model(ids).logits, eager(ids).logits, rtol=1e-5, atol=5e-5)


@pytest.mark.usefixtures("always_faster")
def test_a_copy_has_none() -> None:
    model = compiled("gpt_oss", inside="compiled")
    ids = families.prompt(2, 5)
    with torch.no_grad():
        model(ids)
        layer = with_bodies(model)[0]
        shallow = copy.copy(layer)
        assert not model.forward.compilation.bodies.every[id(layer)].serves(shallow, [torch.zeros(1, 64)])
        assert with_bodies(copy.deepcopy(model)) == []


@pytest.mark.usefixtures("always_faster")
def test_compiling_again_forgets_them() -> None:
    model = compiled("gpt_oss", inside="compiled")
    ids = families.prompt(2, 5)
    with torch.no_grad():
        model(ids)
        assert with_bodies(model)
        glowplug.compile(model, experts="opaque", compiler="eager")
        model(ids)
        assert with_bodies(model) == []


@pytest.mark.usefixtures("always_faster")
def test_a_replaced_weight_is_not_missed() -> None:
    model, eager = compiled("gpt_oss", inside="compiled"), families.build("gpt_oss")
    ids = families.prompt(2, 5)
    with torch.no_grad():
        model(ids)
        name = next(name for name, m in model.named_modules() if m in with_bodies(model) and name.endswith("experts"))
        for one in (model, eager):
            experts = one.get_submodule(name)
            experts.down_proj = nn.Parameter(experts.down_proj * 2, requires_grad=False)
        experts = model.get_submodule(name)
        arguments = torch.randn(3, 64), torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
        expected = eager.get_submodule(name)(*arguments)
        torch.testing.assert_close(model.forward.compilation.bodies.every[id(experts)].run(*arguments), expected)
        torch.testing.assert_close(model(ids).logits, eager(ids).logits, rtol=1e-5, atol=1e-5)


def test_eager_and_inline_have_none() -> None:
    ids = families.prompt(2, 5)
    for options in ({"inside": "eager", "experts": "opaque"}, {"inside": "compiled", "experts": "inline"}):
        model = families.build("gpt_oss")
        glowplug.compile(model, compiler=Uncompiled(), **options)
        with torch.no_grad():
            model(ids)
        # Attention that is several kernels may have one: a trial decides.
        assert [layer for layer in with_bodies(model) if not hasattr(layer, "is_causal")] == []
        assert options["inside"] == "compiled" or with_bodies(model) == []


def test_beside_serving_and_used_from_the_next_sequence_on() -> None:
    if torch.cuda.is_initialized():
        pytest.skip("a process that uses a GPU does not fork")
    eager, model = families.build("glm4_moe"), families.build("glm4_moe")
    glowplug.compile(model, experts="opaque")
    ids = families.prompt(2, 5)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        bodies = model.forward.compilation.op_bodies
        assert bodies.pending
        bodies.job.ended(time.monotonic() + 120)
        model(ids[:, :1], past_key_values=cache)  # goes on with a sequence: nothing changes under it
        assert bodies.pending
        torch.testing.assert_close(model(ids).logits, eager(ids).logits, rtol=1e-4, atol=1e-4)
        assert not bodies.pending
        assert glowplug.report(model).insides
        torch.testing.assert_close(model(ids).logits, eager(ids).logits, rtol=1e-4, atol=1e-4)
    glowplug.settle(model)


@pytest.mark.usefixtures("always_faster")
def test_of_models_that_start_at_once_on_a_store_one_makes_them(tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("beside a GPU nothing forks")
    made = []
    ids = families.prompt(2, 5)
    for count in (1, 3):
        models = [families.build("gpt_oss", layers=8) for _ in range(count)]
        for model in models:
            compiler = StoringGraphs()
            compiler.log = tmp_path / f"log-{count}"
            glowplug.compile(model, experts="opaque", compiler=compiler, cache_dir=tmp_path / f"store-{count}")
        with torch.no_grad():
            expected = type(models[0]).forward(models[0], ids).logits
            for model in models:
                model(ids)
            for model in models:
                glowplug.settle(model)
                assert len(with_bodies(model)) > 8  # experts and attention
                torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=5e-5)
        made.append(len((tmp_path / f"log-{count}").read_text().splitlines()))
    assert made[0] == made[1] > glowplug.report(model).distinct_pieces


class Doubling(nn.Module):
    """Stands for experts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 4, 4), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.002)
        return x * self.weight[0, 0, 0]


def tried(piece: Callable[..., Sequence[Tensor]]) -> Verdict:
    layer = Doubling()
    form = CallForm("op", (Argument((1, "tokens", 4), torch.float32, "values"),))
    group = Group(form, ("layer",), (layer,), "as it is", lambda layer, x: layer(x), lambda: layer)
    return trial.try_body(group, Body(("tensors[0]", "@weight")), piece, limited=True)


def test_a_faster_body_is_used() -> None:
    assert tried(lambda x, weight: (x * weight[0, 0, 0],)).tokens == 512


def test_a_wrong_body_is_not_used() -> None:
    assert tried(lambda x, weight: (x * 2.01,)).tokens == 0
    assert tried(lambda x, weight: (x[:, :, :2],)).tokens == 0


def test_a_slower_body_is_not_used() -> None:
    def slow(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        time.sleep(0.004)
        return (x * weight[0, 0, 0],)

    assert tried(slow).tokens == 0


def test_a_body_that_is_faster_for_few_tokens_only() -> None:
    def sometimes(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        if x.shape[1] > 8:
            time.sleep(0.004)
        return (x * weight[0, 0, 0],)

    assert tried(sometimes).tokens == 8
