"""What the plug-in stores: nothing that grows with depth, and nothing that serves after a change."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import store

DEPTH = 12
LAYER = re.compile(rb"layers(?:\.|'\]\._modules\[')\d+")


def pieces(cache: Path) -> dict[str, bytes]:
    """Name -> content of each stored piece."""
    return {file.name: file.read_bytes() for file in store(cache).glob("pieces/**/*.glow")}


def records(cache: Path) -> dict[str, bytes]:
    """Name -> content of each stored record."""
    return {file.name: file.read_bytes() for file in store(cache).glob("manifests/**/*.glow")}


@pytest.fixture
def model(vllms: Any) -> Path:
    """A model that no test changes."""
    folder: Path = vllms.model("qwen3_moe", num_hidden_layers=DEPTH)
    return folder


def test_nothing_stored_grows_with_depth(vllms: Any, model: Path, tmp_path: Path) -> None:
    """A model three times as deep has the same template, the same pieces in the store, and a record that is hardly
    longer."""
    deep = vllms.model("qwen3_moe")
    (_, few), (outcome, many) = vllms.cold(model), vllms.cold(deep)
    assert outcome.says("traced 4 of 36 layers")
    assert vllms.cold(model)[0].says(f"traced 4 of {DEPTH} layers")
    assert set(pieces(few)) == set(pieces(many)) and pieces(few)
    ((_, short),), ((_, long),) = records(few).items(), records(many).items()
    assert len(long) < 1.3 * len(short)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "glm4_moe"])
def test_no_layer_is_named_in_what_is_stored(vllms: Any, family: str) -> None:
    """A piece serves all layers, so that its code and its graph name none. A record names the first one, where it finds
    what all layers share."""
    model = vllms.model(family, **({"num_hidden_layers": DEPTH} if family == "qwen3_moe" else {}))
    _, cache = vllms.cold(model)
    stored = pieces(cache)
    assert len(stored) >= 4
    assert any(b"extern_kernels" in content or b"unified_attention" in content for content in stored.values())
    assert {name: LAYER.findall(content) for name, content in stored.items() if LAYER.search(content)} == {}
    for content in records(cache).values():
        assert set(LAYER.findall(content)) <= {b"layers']._modules['0"}


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rope_theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 20.0}}, {}),
    "experts a token": ({"num_experts_per_tok": 3}, {}),
    "tokens a batch": ({}, {"max_num_batched_tokens": 512}),
    "dtype": ({}, {"dtype": "bfloat16"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_configuration_uses_no_stored_program(vllms: Any, change: str, model: Path, tmp_path: Path) -> None:
    """A start with another value in the model's or vLLM's configuration traces, in a cache in which the program for the
    old value is stored; and the tokens are those of the new value."""
    config, engine = CHANGES[change]
    cache = vllms.warm(model, tmp_path / "cache")
    changed = vllms.changed(model, tmp_path / "model", **config) if config else model
    outcome = vllms.start(changed, cache, engine=engine)
    assert outcome.says(f"of {DEPTH} layers, compiled") and not outcome.says("traced none")
    if change == "dtype":  # rounding differs between compiled and uncompiled code
        assert len(records(cache)) == 2
        return
    reference = vllms.reference(changed, engine=engine)
    assert outcome.tokens == reference.tokens
    assert bool(config) == (reference.tokens != vllms.reference(model).tokens)


def test_changed_code_of_the_model_uses_no_stored_program(vllms: Any, model: Path, tmp_path: Path) -> None:
    """vLLM's file of the model was changed since the program was stored: a start traces, and the tokens are those of
    the new code."""
    name = "vllm.model_executor.models.qwen3_moe"
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    text = (Path(spec.origin).parent / "model_executor/models/qwen3_moe.py").read_text()
    old = "hidden_states = self.mlp(hidden_states)"
    assert text.count(old) == 1
    (file := tmp_path / "qwen3_moe.py").write_text(text.replace(old, f"{old} * 3.0"))
    patches = [["replace_module", name, str(file)]]
    outcome = vllms.start(model, vllms.warm(model, tmp_path / "cache"), patches=patches)
    assert outcome.says(f"of {DEPTH} layers, compiled") and not outcome.says("traced none")
    reference = vllms.reference(model, patches=patches)
    assert outcome.tokens == reference.tokens != vllms.reference(model).tokens


def test_other_weights_use_the_stored_program(vllms: Any, model: Path, tmp_path: Path) -> None:
    """The program is bound to whatever weights are loaded."""
    other = vllms.model("qwen3_moe", num_hidden_layers=DEPTH, seed=7)
    cache = vllms.warm(model, tmp_path / "cache")
    (record,) = store(cache).glob("manifests/**/*.glow")
    before = record.read_bytes()
    outcome = vllms.start(other, cache)
    reference = vllms.reference(other)
    assert outcome.tokens == reference.tokens != vllms.reference(model).tokens
    assert record.read_bytes() == before


@pytest.mark.parametrize("keep", ["half", "other bytes"])
def test_a_damaged_store_is_built_again(vllms: Any, keep: str, model: Path, tmp_path: Path) -> None:
    """A start whose store is damaged traces, and the next one uses what it stored."""
    cache = vllms.warm(model, tmp_path / "cache")
    for file in store(cache).glob("**/*.glow"):
        content = file.read_bytes()
        middle = len(content) // 2
        damaged = {
            "half": content[:middle],
            "nothing": b"",
            "other bytes": content[:middle] + b"?" * (len(content) // 2),
        }
        file.write_bytes(damaged[keep])
    expected = vllms.reference(model).tokens
    again = vllms.start(model, cache)
    assert again.says(f"of {DEPTH} layers, compiled") and not again.says("traced none")
    assert again.tokens == expected
    warm = vllms.start(model, cache)
    assert warm.says("traced none") and warm.tokens == expected


def test_nothing_is_stored_if_vllm_stores_nothing(vllms: Any, model: Path, tmp_path: Path) -> None:
    """`VLLM_DISABLE_COMPILE_CACHE=1` holds for the plug-in, too."""
    environment = {"VLLM_DISABLE_COMPILE_CACHE": "1"}
    outcome = vllms.start(model, tmp_path, environment=environment)
    assert outcome.says("stamped") and outcome.tokens == vllms.reference(model).tokens
    assert list(tmp_path.glob("**/*.glow")) == []
