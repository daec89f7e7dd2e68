"""A program that is not equal to the decoder's own forward never serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "glm4_moe", "gemma3"])
def test_every_single_wrong_binding_is_refused(vllms: Any, family: str, tmp_path: Path) -> None:
    """The comparison refuses a program in which any one weight or name of the first, a middle or the last layer is
    another layer's, or in which two neighbours are swapped; and it accepts the right program."""
    depth = tiny.FAMILIES[family][1]["num_hidden_layers"]
    model = vllms.model(family)
    layers = [0, depth // 2, depth - 1]
    outcome = vllms.start(model, vllms.warm(model, tmp_path / "cache"), patches=[["try_faults", layers]], tokens=4)
    faults = [(layer, path) for layer, path, *_ in outcome.notes]
    for layer in layers:
        paths = [path for at, path in faults if at == layer]
        assert len(paths) > 5 and any("layer_name" in path for path in paths) and "swapped" in paths
    assert [fault for fault in outcome.notes if fault[-1] is None] == []
    assert outcome.says("traced none")


NORM = "._modules['post_attention_layernorm']._parameters['weight']"
NAME = "._modules['self_attn']._modules['attn'].layer_name"


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("other_tensor", (0, NORM, 1)), ("other_tensor", (6, NAME, 7)), ("swapped", (10, 11))],
    ids=["weight of the first", "name of a middle", "order of the last"],
)
def test_a_wrong_program_is_left_to_vllm(vllms: Any, kind: str, arguments: tuple[Any, ...], tmp_path: Path) -> None:
    """The log has the reason, the tokens are right, and nothing is stored."""
    model = vllms.model("qwen3_moe", num_hidden_layers=12)
    cache = vllms.warm(model, tmp_path / "cache", records=False)
    wrong = vllms.start(model, cache, patches=[["leave_uncompiled"], ["bind_wrongly", kind, *arguments]])
    assert [line for line in wrong.lines if "is left to vLLM: the stamped program is not equal" in line]
    assert wrong.tokens == vllms.reference(model).tokens
    assert list(cache.glob("vllm/torch_compile_cache/glowplug/manifests/**/*.glow")) == []


@pytest.mark.parametrize(
    ("how", "layer"),
    [
        ("epsilon", 7),
        ("forward", 11),
        ("hook", 7),
        ("number", 7),
        ("name", 11),
        ("identity", 7),
        ("shared", 7),
        ("pairs", 7),
    ],
)
def test_a_layer_that_differs_is_seen(vllms: Any, how: str, layer: int, tmp_path: Path) -> None:
    """One layer behaves differently, beyond the template that equal layers have: the tokens are those of vLLM with the
    same layer, and others than without it."""
    model = vllms.model("qwen3_moe", num_hidden_layers=12)
    differ = ["differ", how, layer]
    reference = vllms.reference(model, patches=[differ])
    assert reference.tokens != vllms.reference(model).tokens
    cache = vllms.warm(model, tmp_path / "cache", records=False)
    outcome = vllms.start(model, cache, patches=[["leave_uncompiled"], differ])
    assert outcome.tokens == reference.tokens, outcome.lines
    assert outcome.says("stamped 12 layers") or outcome.says("is left to vLLM")


@pytest.mark.parametrize("how", ["epsilon", "shared"])
def test_a_stored_program_of_equal_layers_never_serves_layers_that_differ(vllms: Any, how: str, tmp_path: Path) -> None:
    """A start finds the record of the same model, in which now one layer behaves differently: the tokens are right."""
    model = vllms.model("qwen3_moe", num_hidden_layers=12)
    differ = ["differ", how, 7]
    cache = vllms.warm(model, tmp_path / "cache")
    outcome = vllms.start(model, cache, patches=[["leave_uncompiled"], differ])
    assert outcome.tokens == vllms.reference(model, patches=[differ]).tokens, outcome.lines
