"""What tries to fool stamping must give eager's own output, one way or the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from fools import (
    CALLS,
    DEPTH,
    FOOLS,
    SCALES,
    STAMPED,
    BeyondInHelper,
    LookedUpElsewhere,
    OwnCounter,
    become,
    float_scale,
    own_name,
    own_name_in_dict,
)
from torch import Tensor, fx
from transformers import DynamicCache, PreTrainedModel

import families
import glowplug
from storing import PickleCompiler


def prepared(prepare: Callable[[PreTrainedModel], None], layers: int = DEPTH) -> PreTrainedModel:
    model = families.build("qwen3", layers=layers)
    prepare(model)
    return model


@functools.cache
def compiled(prepare: Callable[[PreTrainedModel], None]) -> PreTrainedModel:
    """A model that was compiled, and answered one call."""
    model = glowplug.compile(prepared(prepare), compiler="eager")
    with torch.no_grad():
        model(families.prompt(1, 3))
    return model


@pytest.fixture(scope="module", autouse=True)
def forget_models() -> Iterator[None]:
    """Keep none of them for the rest of the suite."""
    yield
    compiled.cache_clear()


def passes(model: PreTrainedModel) -> list[Tensor]:
    """Logits of a prefill, a few decode steps, and a second text."""
    SCALES["now"], CALLS["layers"] = 1.0, 0
    for layer in model.model.layers:
        if isinstance(layer, OwnCounter):
            layer.calls = 0
    outputs = []
    with torch.no_grad():
        for seed in (1, 2):
            cache = DynamicCache(config=model.config)
            ids = families.prompt(2, 9, seed=seed)
            for part in (ids[:, :6], ids[:, 6:7], ids[:, 7:]):
                outputs.append(model(part, past_key_values=cache, use_cache=True).logits)
    return outputs


@pytest.mark.parametrize("prepare", [*FOOLS, *STAMPED], ids=lambda p: p.__name__)
def test_the_output_is_eagers(prepare: Callable[[PreTrainedModel], None]) -> None:
    expected = passes(prepared(prepare))
    model = compiled(prepare)  # what the trace and the comparison did must not show below
    for output, wanted in zip(passes(model), expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
    report = glowplug.report(model)
    if prepare in STAMPED:
        assert (report.strategy, report.fallbacks) == ("stamped", [])


UNSEEN = ("BeyondInHelper", "Slightly", "LookedUpElsewhere", "FifthBack", "SkippingDeep")
"""What nothing in the trace of a template shows."""


@pytest.mark.parametrize(
    "prepare", [prepare for prepare in FOOLS if prepare.__name__ in UNSEEN], ids=lambda p: p.__name__
)
def test_what_only_the_comparison_can_see(prepare: Callable[[PreTrainedModel], None]) -> None:
    report = glowplug.report(compiled(prepare))
    assert report.strategy != "stamped"
    assert report.fallbacks and "stamp" in report.fallbacks[0].reason


@pytest.mark.parametrize("prepare", [own_name, own_name_in_dict], ids=lambda p: p.__name__)
def test_a_layer_that_reads_its_own_name_is_found_by_its_trace(prepare: Callable[[PreTrainedModel], None]) -> None:
    model = glowplug.compile(prepared(prepare), compiler="eager", verify="off")
    with torch.no_grad():
        model(families.prompt(1, 3))
    report = glowplug.report(model)
    assert report.strategy == "hoisted"
    assert "read their own name" in report.fallbacks[0].reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_stamp_is_found(dtype: torch.dtype) -> None:
    """Of half precision, too, where one layer of twelve is wrong by a tenth."""
    model = glowplug.compile(prepared(become(LookedUpElsewhere), layers=12).to(dtype), compiler="eager")
    with torch.no_grad():
        model(families.prompt(1, 3))
    (fallback,) = glowplug.report(model).fallbacks
    assert fallback.to == "hoisted"
    assert "the stamped program is not equal to eager: the program differs from eager for 3 x " in fallback.reason
    assert glowplug.report(model).strategy == "hoisted"


class WrongInOnePlace(PickleCompiler):
    """One piece, that of most layers, gives a twentieth too much."""

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        run = super().compile(piece, inputs)
        factor = 1.05 if self.compiled == 2 else 1.0
        return lambda *args: tuple(value * factor for value in run(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_compiled_slot_is_found(dtype: torch.dtype) -> None:
    model = glowplug.compile(families.build("qwen3", layers=DEPTH).to(dtype), compiler=WrongInOnePlace())
    ids = families.prompt(1, 3)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, type(model).forward(model, ids).logits)
    report = glowplug.report(model)
    assert report.strategy == "eager"
    assert "compiled.output[0] differs by 5.0e-02" in report.fallbacks[0].reason or dtype is torch.bfloat16
    assert all("compiled.output[0] differs by" in fallback.reason for fallback in report.fallbacks)


def test_strict_raises_instead() -> None:
    model = glowplug.compile(prepared(become(BeyondInHelper)), compiler="eager", strict=True)
    with torch.no_grad(), pytest.raises(glowplug.NotServableError, match="can't stamp"):
        model(families.prompt(1, 3))


def test_reasons_name_what_differs() -> None:
    (fallback,) = glowplug.report(compiled(float_scale)).fallbacks
    assert "layers 0 and 1 differ in .scale 1.0; .scale 1.1" in fallback.reason
