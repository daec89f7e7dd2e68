"""Presets have the depth and the layer pattern of the models that they stand for, at any depth, and run."""

from __future__ import annotations

import pytest
import torch
import transformers

from glowplug.bench.presets import PRESETS, build_config, build_model, get_preset
from glowplug.bench.strategies import layer_stack
from glowplug.errors import UsageError

DEPTHS = {
    "gpt-oss-120b": 36,
    "gpt-oss-20b": 24,
    "glm-4.7": 92,
    "ernie-4.5-vl-28b-a3b": 28,
    "qwen3-235b-a22b": 94,
    "qwen3-30b-a3b": 48,
    "deepseek-v3": 61,
    "llama-4-maverick": 48,
    "mixtral-8x22b": 56,
    "qwen3-dense": 28,
}
FULL_HIDDEN = {
    "gpt-oss-120b": 2880,
    "gpt-oss-20b": 2880,
    "glm-4.7": 5120,
    "ernie-4.5-vl-28b-a3b": 2560,
    "qwen3-235b-a22b": 4096,
    "qwen3-30b-a3b": 2048,
    "deepseek-v3": 7168,
    "llama-4-maverick": 5120,
    "mixtral-8x22b": 6144,
    "qwen3-dense": 2048,
}
GPU_BYTES = 140e9


def has_experts(layer: torch.nn.Module) -> bool:
    """Whether a decoder layer routes tokens to experts."""
    return any(name.rpartition(".")[2] == "experts" for name, _ in layer.named_modules())


@pytest.mark.parametrize("name", PRESETS)
def test_true_depth_builds_and_runs(name: str) -> None:
    model = build_model(name)
    layers = layer_stack(model)
    assert len(layers) == DEPTHS[name] == get_preset(name).depth
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, 16))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert logits.isfinite().all()
    assert 0.3 < logits.std() < 3
    assert logits.argmax(-1).unique().numel() > 3


@pytest.mark.parametrize("name", PRESETS)
def test_full_width_has_the_real_sizes_and_fits_one_gpu(name: str) -> None:
    preset, config = get_preset(name), build_config(name, width="full", dtype=torch.bfloat16)
    text = config.get_text_config()
    assert text.hidden_size == FULL_HIDDEN[name]
    assert text.num_hidden_layers == DEPTHS[name]
    assert text.vocab_size > 30_000
    with torch.device("meta"):
        model = getattr(transformers, preset.model_class)._from_config(config, dtype=torch.bfloat16)
    assert sum(parameter.numel() * 2 for parameter in model.parameters()) < 0.85 * GPU_BYTES
    if preset.experts:
        experts = (
            getattr(text, "n_routed_experts", None) or getattr(text, "num_local_experts", None) or text.num_experts
        )
        assert text.num_experts_per_tok <= experts <= preset.experts


@pytest.mark.parametrize("name", ["gpt-oss-120b", "gpt-oss-20b"])
def test_gpt_oss_alternates_sliding_and_full_attention(name: str) -> None:
    config = build_config(name)
    assert config.layer_types[::2] == ["sliding_attention"] * (DEPTHS[name] // 2)
    assert config.layer_types[1::2] == ["full_attention"] * (DEPTHS[name] // 2)
    assert config.sliding_window == 128


@pytest.mark.parametrize("name", ["glm-4.7", "deepseek-v3"])
def test_first_three_layers_are_dense(name: str) -> None:
    layers = layer_stack(build_model(name))
    assert [has_experts(layer) for layer in layers] == [False] * 3 + [True] * (len(layers) - 3)
    assert hasattr(layers[3].mlp, "shared_experts")


def test_ernie_has_one_dense_layer_and_two_sets_of_experts() -> None:
    layers = layer_stack(build_model("ernie-4.5-vl-28b-a3b"))
    assert [has_experts(layer) for layer in layers] == [False] + [True] * 27
    assert hasattr(layers[1].mlp, "text_moe")
    assert hasattr(layers[1].mlp, "vision_moe")


def test_maverick_has_experts_in_every_other_layer_and_full_attention_in_every_fourth() -> None:
    model = build_model("llama-4-maverick")
    layers = layer_stack(model)
    assert [has_experts(layer) for layer in layers] == [False, True] * 24
    assert model.config.layer_types == [*["chunked_attention"] * 3, "full_attention"] * 12
    assert [bool(layer.self_attn.use_rope) for layer in layers] == [True, True, True, False] * 12


def test_dense_preset_has_no_experts() -> None:
    assert not any(has_experts(layer) for layer in layer_stack(build_model("qwen3-dense", depth=4)))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("depth", [1, 5, 130])
def test_any_depth_keeps_the_pattern(name: str, depth: int) -> None:
    own, other = build_config(name).get_text_config(), build_config(name, depth=depth).get_text_config()
    assert other.num_hidden_layers == depth
    for key in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        ours, theirs = getattr(own, key, None), getattr(other, key, None)
        if ours is not None:
            assert len(theirs) == depth
            assert theirs[: len(ours)] == ours[:depth]
            assert set(theirs) <= set(ours)
    if depth < 10:
        assert len(layer_stack(build_model(name, depth=depth))) == depth


def test_weights_come_from_the_seed_and_leave_the_callers_random_state() -> None:
    before = torch.random.get_rng_state()
    one, two, other = (build_model("mixtral-8x22b", depth=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("depth", [0, -3])
def test_depth_below_one_is_refused(depth: int) -> None:
    with pytest.raises(UsageError, match=f"depth must be at least 1, not {depth}"):
        build_model("glm-4.7", depth=depth)


def test_unknown_preset_lists_the_presets() -> None:
    with pytest.raises(UsageError, match=r"unknown preset 'gpt-5'.*gpt-oss-120b.*qwen3-dense"):
        build_config("gpt-5")


def test_unknown_width_is_refused() -> None:
    with pytest.raises(UsageError, match="tiny, full"):
        build_config("glm-4.7", width="wide")  # type: ignore[arg-type]
