"""Copies, files and pickles of a compiled model: independent of it, and free of anything of glowplug's."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import families
import glowplug
from storing import PickleCompiler

IDS = families.prompt(2, 9)


def every_param_data(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 1.5


def eager(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return type(model).forward(model, IDS).logits


def quiet(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def compiled(**options: Any) -> PreTrainedModel:
    return glowplug.compile(families.build("gpt_oss", layers=2), compiler="eager", **options)


@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe", "ernie4_5_vl_moe"])
def test_deepcopy(family: str, used: bool) -> None:
    model = glowplug.compile(families.build(family, layers=3), compiler="eager", experts="opaque")

    def tokens(one: PreTrainedModel) -> Tensor:
        return one.generate(IDS, max_new_tokens=8, do_sample=False)

    before = tokens(model) if used else None
    twin = copy.deepcopy(model)
    assert glowplug.report(twin) is not glowplug.report(model)
    every_param_data(twin)
    plain = families.build(family, layers=3)
    unchanged = tokens(plain)
    every_param_data(plain)
    assert torch.equal(tokens(twin), tokens(plain))
    assert torch.equal(tokens(model), unchanged)
    assert before is None or torch.equal(before, unchanged)
    assert glowplug.report(twin).fallbacks == glowplug.report(model).fallbacks == []


def test_deepcopy_outlives_the_original() -> None:
    model = compiled(experts="opaque")
    expected = quiet(model)
    twin = copy.deepcopy(model)
    del model
    assert torch.equal(quiet(twin), expected)


def test_save_and_load(tmp_path: Path) -> None:
    model = compiled()
    expected = quiet(model)
    model.save_pretrained(tmp_path)
    assert not [key for key in model.state_dict() if "glowplug" in key]
    assert "glowplug" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(eager(loaded), expected)
    assert torch.equal(quiet(glowplug.compile(loaded, compiler="eager")), expected)


def test_the_config_is_as_it_was() -> None:
    model = families.build("gpt_oss", layers=2)
    before = model.config.to_json_string(), model.config._attn_implementation, model.config._experts_implementation
    for options in ({"experts": "inline"}, {"experts": "opaque"}, {"identity": "ordered", "experts": "opaque"}):
        glowplug.compile(model, compiler="eager", **options)
        quiet(model)
    assert before == (
        model.config.to_json_string(),
        model.config._attn_implementation,
        model.config._experts_implementation,
    )


@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
def test_pickle(used: bool) -> None:
    model = compiled()
    expected = quiet(model) if used else eager(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(quiet(loaded), expected)
    every_param_data(loaded)
    assert torch.equal(quiet(loaded), eager(loaded))
    assert torch.equal(quiet(model), expected)


def test_torch_save() -> None:
    model, file = compiled(), io.BytesIO()
    expected = quiet(model)
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(quiet(torch.load(file, weights_only=False)), expected)


def test_deepcopy_of_a_model_that_starts_in_the_background() -> None:
    model = glowplug.compile(families.build("gpt_oss", layers=2), compiler=PickleCompiler(), background=True)
    twin = copy.deepcopy(model)
    every_param_data(twin)
    assert torch.equal(quiet(twin), eager(twin))
    assert not torch.equal(quiet(twin), quiet(model))
