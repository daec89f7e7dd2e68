"""When the plug-in serves, and what it leaves to vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

DEPTH = 12


@pytest.fixture
def model(vllms: Any) -> Path:
    """A model that no test changes."""
    folder: Path = vllms.model("qwen3_moe", num_hidden_layers=DEPTH)
    return folder


def test_the_plug_in_can_be_switched_off(vllms: Any) -> None:
    """`GLOWPLUG_VLLM=0`: vLLM is not patched, compiles the decoder, and nothing is logged."""
    outcome = vllms.reference(vllms.model("gpt_oss"), eager=False)
    assert (outcome.patched, outcome.lines) == (False, [])
    assert outcome.graphs > 0


def test_nothing_is_compiled_in_eager_mode(vllms: Any, model: Path, tmp_path: Path) -> None:
    """`enforce_eager=True`: the plug-in is there and does nothing."""
    outcome = vllms.start(model, tmp_path, engine={"enforce_eager": True})
    assert (outcome.patched, outcome.prepared, outcome.lines, outcome.graphs) == (True, False, [], 0)
    assert outcome.tokens == vllms.reference(model).tokens
    assert list(tmp_path.glob("**/*.glow")) == []


def test_a_shallow_decoder_is_compiled_by_vllm(vllms: Any, tmp_path: Path) -> None:
    """A decoder no deeper than its template is left to vLLM, which compiles it and gives its own tokens."""
    model = vllms.model("llama", num_hidden_layers=3)
    outcome = vllms.start(model, tmp_path)
    assert outcome.lines == ["glowplug: LlamaModel is left to vLLM: it has no layers that repeat"]
    assert outcome.graphs > 0
    assert outcome.distinct > 20 and outcome.tokens == vllms.reference(model).tokens


def test_layers_that_follow_no_rule_are_left_to_vllm(vllms: Any, tmp_path: Path) -> None:
    """Dense layers and layers with experts in an order that does not repeat: the log says so, and tokens are right."""
    dense = [0, 2, 5, 6, 10, 11]
    model = vllms.model("qwen3_moe", num_hidden_layers=DEPTH, mlp_only_layers=dense)
    outcome = vllms.start(model, tmp_path, patches=[["leave_uncompiled"]])
    assert outcome.tokens == vllms.reference(model).tokens
    (line,) = outcome.lines
    assert "Qwen3MoeModel is left to vLLM: " in line


def test_latent_attention_is_stamped(vllms: Any, tmp_path: Path) -> None:
    """DeepSeek-V3: the tokens are those of an uncompiled vLLM with the ops of a compiled one, and the log says how."""
    model = vllms.model("deepseek_v3")
    reference = vllms.reference(model, engine={"compilation_config": {"custom_ops": ["none"]}})
    outcome = vllms.start(model, tmp_path, patches=[["leave_uncompiled"]])
    assert outcome.says("traced 4 of 8 layers") and outcome.says("stamped 8 layers")
    assert reference.distinct > 20 and outcome.tokens == reference.tokens


@pytest.mark.parametrize("name", ["vllm.compilation.wrapper.Gone", "vllm.gone.anything"])
def test_another_vllm_starts_without_the_plug_in(vllms: Any, name: str, tmp_path: Path) -> None:
    """A vLLM that lacks a name which the plug-in needs is left alone, and one line says so."""
    model = vllms.model("llama", num_hidden_layers=3)
    outcome = vllms.start(model, tmp_path, patches=[["miss_name", name]], engine={"enforce_eager": True}, tokens=4)
    (line,) = outcome.lines
    assert line.startswith("glowplug: vLLM compiles without it: ") and name in line
    assert outcome.patched is False


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("fitness", "why_left_alone"),
        ("decoder", "read_call"),
        ("start", "get_compiler"),
        ("start", "capture"),
        ("start", "compare"),
    ],
)
def test_a_failure_of_the_plug_in_never_fails_vllm(
    vllms: Any, module: str, name: str, model: Path, tmp_path: Path
) -> None:
    """Whatever part of the plug-in raises, vLLM serves the model, and the log says why the plug-in does not."""
    cache = vllms.warm(model, tmp_path / "cache", records=False)
    if module == "fitness":  # it is left to vLLM before it starts
        model = vllms.model("llama", num_hidden_layers=3)
    outcome = vllms.start(model, cache, patches=[["leave_uncompiled"], ["fail", module, name]])
    assert outcome.says("left to vLLM") and outcome.says("this is broken")
    assert outcome.tokens == vllms.reference(model).tokens


@pytest.mark.parametrize("forks", [False, True], ids=["here", "forks"])
def test_pieces_compiled_by_vllm_serve(vllms: Any, forks: bool, model: Path, tmp_path: Path) -> None:
    """vLLM's own backend for pieces, with which the plug-in compiles on a GPU: cold and warm, the tokens are right."""
    expected = vllms.reference(model).tokens
    patches = [["piecewise", forks]]
    cold = vllms.start(model, tmp_path, patches=patches)
    assert cold.says(f"of {DEPTH} layers, compiled 3 pieces") and cold.tokens == expected
    assert cold.notes.count("own forward") == 1
    if forks:  # which compile while the own forward runs here
        assert cold.notes[0] == "own forward" and len(cold.notes) < 4
    else:
        assert cold.notes == [*["compiled"] * 3, "own forward"]
    warm = vllms.start(model, tmp_path, patches=patches)
    assert warm.says(f"traced none of {DEPTH} layers, loaded 3 pieces") and warm.tokens == expected


def test_two_ranks_stamp(vllms: Any, model: Path, tmp_path: Path) -> None:
    """Tensor parallel: each rank is a process, which stamps its part of every layer; cold and warm."""
    job = {"engine": {"tensor_parallel_size": 2}, "environment": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}}
    expected = vllms.reference(model, **job).tokens
    for how in (f"of {DEPTH} layers, compiled 3 pieces", f"traced none of {DEPTH} layers, loaded 3 pieces"):
        start = vllms.start(model, tmp_path, patches=[["piecewise", True]], **job)
        assert start.log.read_text().count(how) == 2
        assert start.tokens == expected
