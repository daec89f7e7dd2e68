"""Programs built without weights, behind the weights, and while eager serves."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import families
import glowplug
from glowplug.frontends.hf import cases
from glowplug.frontends.hf.builds import bake, weightless_model
from glowplug.options import Options
from storing import StoringGraphs
from test_deferred import uncompiled

DEPTH = 8
forks = pytest.mark.skipif(torch.accelerator.is_available(), reason="beside a GPU nothing forks")


def baked(store: Path, model: PreTrainedModel, **options: Any) -> glowplug.Report:
    """Bake what a model's configuration describes."""
    twin = weightless_model(model.config, dtype=torch.float32, device=torch.device("cpu"))
    return bake(twin, Options(compiler=StoringGraphs(), cache_dir=store, ends="compiled", **options)).report


@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe", "llama4", "deepseek_v3", "qwen3", "ernie4_5_vl_moe"])
def test_what_is_baked_serves_the_real_model(family: str, tmp_path: Path) -> None:
    model = families.build(family, layers=DEPTH)
    report = baked(tmp_path / "store", model)
    assert report.programs == 1 and not report.fallbacks
    compiler = StoringGraphs()
    glowplug.compile(model, compiler=compiler, cache_dir=tmp_path / "store")
    ids = families.prompt(2, 5)
    prepare: Any = model._prepare_position_ids_for_generation
    inputs = {"input_ids": ids, "position_ids": prepare(ids, {})}
    with torch.no_grad():
        actual = model(**inputs).logits
        expected = type(model).forward(model, **inputs).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    report = glowplug.report(model)
    assert report.start == "warm", report
    assert (compiler.compiled, report.phases["trace"]) == (0, 0.0)


def test_a_weightless_model_has_no_memory() -> None:
    config = families.build("glm4_moe", layers=4).config
    config.hidden_size, config.moe_intermediate_size, config.n_routed_experts = 8192, 4096, 256
    model = weightless_model(config, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert sum(p.numel() for p in model.parameters()) > 2e10


def test_tied_weights_stay_tied_without_weights() -> None:
    real = families.build("qwen3", layers=2)
    real.config.tie_word_embeddings = True
    model = weightless_model(real.config, dtype=torch.float32, device=torch.device("cpu"))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def save(model: PreTrainedModel, folder: Path) -> str:
    """A model's folder."""
    model.save_pretrained(folder)
    return str(folder)


@forks
def test_from_pretrained_builds_behind_the_weights(tmp_path: Path) -> None:
    original = families.build("glm4_moe", layers=DEPTH)
    compiler = StoringGraphs()
    model = glowplug.from_pretrained(
        save(original, tmp_path / "model"), compiler=compiler, cache_dir=tmp_path / "store", dtype=torch.float32
    )
    report = glowplug.report(model)
    assert report.elsewhere is not None and report.elsewhere.reason is None
    assert (report.start, report.strategy, compiler.compiled) == ("warm", "stamped", 0)
    assert report.elsewhere.load_seconds > 0 and "hidden" in str(report)
    ids = families.prompt(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)


@forks
def test_from_pretrained_without_a_store_and_with_a_failing_build(tmp_path: Path) -> None:
    original = families.build("gpt_oss", layers=DEPTH)
    folder = save(original, tmp_path / "model")
    for fault in ("", "raises", "dies"):
        model = glowplug.from_pretrained(folder, compiler=StoringGraphs(fault), cache_dir="off")
        elsewhere = glowplug.report(model).elsewhere
        assert elsewhere is not None and (elsewhere.reason is None) == (not fault)
        assert glowplug.report(model).strategy == "stamped"
        ids = families.prompt(1, 4)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)


@forks
def test_ends_are_compiled_after_the_build_has_said_that_it_is_done(tmp_path: Path) -> None:
    original = families.build("gpt_oss", layers=20)
    folder = save(original, tmp_path / "model")
    options: dict[str, Any] = {"cache_dir": tmp_path / "store", "dtype": torch.float32}
    model = glowplug.from_pretrained(folder, compiler=StoringGraphs("slow ends"), **options)
    report = glowplug.report(model)
    assert (report.start, report.pending_pieces, report.distinct_pieces) == ("warm", 2, 3)
    assert "still being compiled" in str(report)
    ids = families.prompt(2, 6)
    with torch.no_grad():
        expected = original(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        assert uncompiled(model) == 2
        glowplug.settle(model)
        assert (report.pending_pieces, report.compiled_pieces, uncompiled(model)) == (0, 0, 0)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert report.fallbacks == []
    later = glowplug.from_pretrained(folder, compiler=StoringGraphs("raises"), **options)
    assert (glowplug.report(later).start, glowplug.report(later).pending_pieces) == ("warm", 0)


@forks
def test_ends_that_nobody_delivers_stay_uncompiled_and_are_made_at_the_next_start(tmp_path: Path) -> None:
    original = families.build("gpt_oss", layers=20)
    folder = save(original, tmp_path / "model")
    ids = families.prompt(2, 6)
    for fault in ("ends die", ""):
        options: dict[str, Any] = {"cache_dir": tmp_path / "store", "dtype": torch.float32}
        model = glowplug.from_pretrained(folder, compiler=StoringGraphs(fault), **options)
        glowplug.settle(model)
        report = glowplug.report(model)
        assert (report.start, report.pending_pieces, uncompiled(model)) == ("warm", 0, 2 if fault else 0)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)


@forks
def test_others_start_with_ends_that_a_cold_start_still_compiles(tmp_path: Path) -> None:
    """A fork of the first compiles them; whoever must have all compiled waits for it."""

    class Slow(StoringGraphs):
        def compile(self, piece: Any, inputs: Any) -> Any:
            if os.getpid() != self.home:
                time.sleep(1.5)
            return super().compile(piece, inputs)

    ids = families.prompt(2, 6)
    for compiler, ends, pending in (
        (Slow(), "auto", 2),
        (StoringGraphs("raises"), "auto", 2),
        (StoringGraphs("raises"), "compiled", 0),
    ):
        model = families.build("gpt_oss", layers=20)
        glowplug.compile(model, compiler=compiler, cache_dir=tmp_path / "store", ends=ends)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, type(model).forward(model, ids).logits, rtol=1e-5, atol=1e-5)
        report = glowplug.report(model)
        assert (report.pending_pieces, uncompiled(model), report.fallbacks) == (pending, pending, [])


def started(store: Path, compiler: Any, **options: Any) -> tuple[PreTrainedModel, glowplug.Report]:
    """A deep model whose first answer is eager's."""
    model = families.build("gpt_oss", layers=20)
    ids = families.prompt(2, 6)
    glowplug.compile(model, compiler=compiler, cache_dir=store, **options)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, type(model).forward(model, ids).logits, rtol=1e-5, atol=1e-5)
    return model, glowplug.report(model)


@forks
def test_what_a_process_left_uncompiled_is_compiled_by_the_next(tmp_path: Path) -> None:
    """Whoever finds its program makes it anew, and what nobody finished before its first answer."""
    first, report = started(tmp_path, StoringGraphs("dies"))
    glowplug.settle(first)
    assert (report.start, uncompiled(first)) == ("cold", 2)
    compiler = StoringGraphs("dies")
    later, report = started(tmp_path, compiler)
    assert (report.start, report.pending_pieces, uncompiled(later)) == ("cold", 0, 0)
    assert (compiler.compiled, report.fallbacks) == (2, [])
    last, report = started(tmp_path, StoringGraphs("raises"))
    assert (report.start, report.pending_pieces, uncompiled(last)) == ("warm", 0, 0)


@forks
@pytest.mark.parametrize("how", ["all compiled", "no forks"])
def test_without_forks_beside_serving_what_nobody_finished_is_made_first(how: str, tmp_path: Path) -> None:
    class Alone(StoringGraphs):
        def forks(self, inputs: Any, *, several: bool = False) -> bool:
            return how != "no forks"

    first, _ = started(tmp_path, StoringGraphs("dies"))
    glowplug.settle(first)
    model, report = started(tmp_path, Alone(), ends="auto" if how == "no forks" else "compiled")
    assert (report.start, report.pending_pieces, uncompiled(model)) == ("cold", 0, 0)


@forks
def test_an_end_that_writes_down_relations_is_compiled_with_its_program_from_then_on(tmp_path: Path) -> None:
    """Beside serving, its relations would come too late for the program that was stored."""

    class Relating(StoringGraphs):
        def compile(self, piece: Any, inputs: Any) -> Any:
            if any("embedding" in str(node.target) for node in piece.graph.nodes):
                tokens = next(value for value in inputs if isinstance(value, torch.Tensor)).shape[-1]
                assert tokens < 12345
            return super().compile(piece, inputs)

    states = []
    for _ in range(4):
        model, report = started(tmp_path / "store", Relating())
        begun = (report.start, report.pending_pieces)
        glowplug.settle(model)
        states.append((*begun, uncompiled(model)))
    assert states[0] == ("cold", 2, 1)  # not compiled: this program knows nothing of the relation
    assert states[1][0] == "cold" and states[2:] == [("warm", 0, 0)] * 2


@forks
def test_a_program_that_is_made_anew_need_not_be_compared_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = started(tmp_path, StoringGraphs("dies"))
    glowplug.settle(first)
    glowplug.settle(started(tmp_path, StoringGraphs())[0])
    asked: list[Any] = []
    own = cases.sequences

    def sequences(model: Any, call: Any, classes: Any, **further: Any) -> Any:
        asked.append(classes)
        return own(model, call, classes, **further)

    monkeypatch.setattr(cases, "sequences", sequences)
    started(tmp_path, StoringGraphs())
    assert asked == [cases.GLANCE]


def test_from_pretrained_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(glowplug.UsageError, match="no configuration"):
        glowplug.from_pretrained(tmp_path / "nothing")
    with pytest.raises(glowplug.UsageError, match="identity must be"):
        glowplug.from_pretrained(tmp_path / "nothing", identity="none")


def in_background(fault: str = "", **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model that starts in the background, and an equal one."""
    model, other = (families.build("gpt_oss", layers=DEPTH) for _ in range(2))
    other.load_state_dict(model.state_dict())
    glowplug.compile(model, compiler=StoringGraphs(fault), background=True, **options)
    return model, other


@forks
def test_background_answers_at_once_and_takes_over_between_two_steps() -> None:
    model, other = in_background()
    ids = families.prompt(1, 6)
    expected = other.generate(ids, max_new_tokens=120, do_sample=False)
    assert glowplug.report(model).strategy == "eager"
    tokens = ids
    cache, waited = None, False
    with torch.no_grad():
        for _ in range(120):
            output = model(tokens if cache is None else tokens[:, -1:], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            tokens = torch.cat([tokens, output.logits[:, -1:].argmax(-1)], -1)
            if tokens.shape[1] == 40:  # in the middle of the sequence
                assert not waited
                glowplug.settle(model)
                waited = True
    assert tokens.tolist() == expected.tolist()
    report = glowplug.report(model)
    assert (report.strategy, report.start) == ("stamped", "warm")
    assert report.elsewhere is not None and report.elsewhere.eager_calls > 0
    assert report.elsewhere.seconds is not None and not report.fallbacks


@pytest.mark.parametrize("fault", ["raises", "dies"])
def test_a_failing_build_leaves_eager_running(fault: str) -> None:
    model, other = in_background(fault)
    ids = families.prompt(2, 5)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(ids).logits, other(ids).logits)
            glowplug.settle(model)
    report = glowplug.report(model)
    assert report.strategy == "eager"
    assert [f.reason for f in report.fallbacks if "came to nothing" in f.reason]


def test_background_with_a_filled_store_is_warm_at_the_second_call(tmp_path: Path) -> None:
    model, other = in_background(cache_dir=tmp_path / "store")
    baked(tmp_path / "store", other)
    ids = families.prompt(2, 5)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-5, atol=1e-5)
    assert glowplug.report(model).start == "warm" and glowplug.report(model).elsewhere is None


def test_a_model_changed_meanwhile_is_not_served_stale() -> None:
    model, other = in_background()
    ids = families.prompt(2, 5)
    with torch.no_grad():
        model(ids)
        model(ids)
        for changed in (model, other):
            changed.model.layers[5].mlp.router.register_forward_hook(lambda *_: None)
            changed.model.layers[3].input_layernorm.weight.mul_(2)
        glowplug.settle(model)
        for _ in range(2):
            torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"strict": True}, {"identity": "baked"}, {"compiler": "eager"}], ids=["strict", "baked", "eager"]
)
def test_background_refuses_what_it_can_not_do(options: dict[str, Any]) -> None:
    with pytest.raises(glowplug.UsageError, match="background=True"):
        glowplug.compile(families.build("qwen3", layers=2), background=True, **options)


def test_background_is_for_language_models() -> None:
    with pytest.raises(glowplug.UsageError, match="causal language models"):
        glowplug.compile(torch.nn.Linear(2, 2), background=True)


def test_the_build_does_not_hold_up_the_first_answer() -> None:
    model, _ = in_background()
    start = time.perf_counter()
    with torch.no_grad():
        model(families.prompt(1, 4))
        assert glowplug.report(model).elsewhere is None
        model(families.prompt(1, 4))
    elapsed = time.perf_counter() - start
    elsewhere = glowplug.report(model).elsewhere
    assert elsewhere is not None and elsewhere.seconds is None, f"the answer took {elapsed:.2f} s"
