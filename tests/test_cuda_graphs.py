"""Decode steps by CUDA graphs: what is recorded, when a recording must not serve, and that tokens stay eager's. Where
there is no GPU, a tape takes its place."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import families
import glowplug
import glowplug.compilation
import glowplug.engine
from glowplug.cuda_graphs.memory import Reads
from glowplug.cuda_graphs.pieces import PieceGraphs
from glowplug.report import Report
from recorder import RealRecorder, TapeRecorder
from storing import PickleCompiler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = ["gpt_oss", "glm4_moe", "qwen3_moe"]
NEW = 24


AnyRecorder = TapeRecorder | RealRecorder


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, stored: dict[str, Any]) -> AnyRecorder:
    """What records, and counts what it did; and a store, as all record what was traced once."""
    monkeypatch.setenv("GLOWPLUG_CACHE", str(stored["cache_dir"]))
    made = RealRecorder() if DEVICE == "cuda" else TapeRecorder()
    monkeypatch.setattr(glowplug.compilation, "recorder_for", lambda device: made)
    return made


def prompt(batch: int, tokens: int) -> torch.Tensor:
    """Ids on the device."""
    return families.prompt(batch, tokens).to(DEVICE)


def compiled(family: str, **options: Any) -> tuple[Any, Any]:
    """A model and its compiled twin."""
    own, twin = families.build(family).to(DEVICE), families.build(family).to(DEVICE)
    compiler = "inductor" if DEVICE == "cuda" else PickleCompiler()  # a GPU can't record what Inductor folds
    settings: dict[str, Any] = {"compiler": compiler, "ends": "compiled", "inside": "eager"}
    glowplug.compile(twin, cuda_graphs="auto", **(settings | options))
    return own, twin


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Greedy tokens over a static cache."""
    settings = {"do_sample": False, "max_new_tokens": NEW, "cache_implementation": "static", "disable_compile": True}
    output: torch.Tensor = model.generate(ids, **(settings | options))
    return output


class Steps:
    """A sequence over a static cache, token by token."""

    def __init__(self, model: Any, batch: int = 1, extent: int = 64, *, growing: bool = False) -> None:
        self.model = model
        static = StaticCache(config=model.config, max_cache_len=extent)
        self.cache: Any = DynamicCache(config=model.config) if growing else static
        self.position = 0
        self.batch = batch

    @torch.no_grad()
    def __call__(self, tokens: int = 1) -> torch.Tensor:
        """The logits of the next tokens."""
        positions = torch.arange(self.position, self.position + tokens, device=DEVICE).expand(self.batch, -1)
        ids = positions % 200 + 3
        self.position += tokens
        output = self.model(input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True)
        logits: torch.Tensor = output.logits
        return logits


def both(family: str, *, growing: bool = False, **options: Any) -> tuple[Steps, Steps]:
    """The same sequence of a model and of its compiled twin, after a prompt of 5 tokens."""
    own, twin = (Steps(model, growing=growing) for model in compiled(family, **options))
    torch.testing.assert_close(twin(5), own(5))
    return own, twin


def five_steps(own: Any, twin: Any, batch: int) -> list[Steps]:
    """A prompt of 4 tokens and 4 steps of both models, compared."""
    steps = [Steps(model, batch) for model in (own, twin)]
    for step in steps:
        step(4)
    for _ in range(4):
        torch.testing.assert_close(steps[1](), steps[0]())
    return steps


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_eager_and_one_recording_serves(recorder: AnyRecorder, family: str) -> None:
    own, twin = compiled(family)
    ids = prompt(2, 5)
    assert torch.equal(generate(twin, ids), generate(own, ids))
    phases = len(recorder.recordings)
    assert recorder.replays >= NEW - 2 - 2 * phases and phases <= 2  # a window that fills up is another phase
    report = glowplug.report(twin)
    assert report.cuda_graphs.count == phases and report.fallbacks == []
    again = recorder.replays
    for other in (ids, prompt(2, 5) + 1):  # each time another cache, which takes over the memory of the last
        assert torch.equal(generate(twin, other), generate(own, other))
    assert len(recorder.recordings) == phases and recorder.replays == again + 2 * (NEW - 1)


def test_a_window_that_fills_up(recorder: AnyRecorder) -> None:
    """The cache's code does something else once the window is full."""
    own, twin = compiled("gpt_oss")
    window = own.config.sliding_window
    steps = [Steps(model, extent=window + 40) for model in (own, twin)]
    assert window < 40
    for step in steps:
        step(5)
    for _ in range(window + 20):
        expected, logits = (step() for step in steps)
        torch.testing.assert_close(logits, expected)
    assert len(recorder.recordings) == 2


def test_nothing_is_recorded_of_prompts(recorder: AnyRecorder) -> None:
    _, twin = compiled("qwen3_moe")
    steps = Steps(twin)
    for _ in range(4):
        steps(3)
    assert recorder.attempts == 0


class Kept(DynamicCache):
    """A cache of a class that glowplug does not know: it may keep what it is given."""


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_are_replayed_between_the_attention_of_a_growing_cache(recorder: AnyRecorder, family: str) -> None:
    own, twin = compiled(family)
    ids = prompt(2, 5)
    for other in (ids, ids[:1], ids + 1):
        outputs = [model.generate(other, do_sample=False, max_new_tokens=NEW) for model in (own, twin)]
        assert torch.equal(*outputs)
    pieces = glowplug.report(twin).pieces
    assert len(recorder.recordings) == 2 * pieces  # one for each batch size
    assert recorder.replays == pieces * (NEW - 2 + NEW - 2 + NEW - 1)
    assert glowplug.report(twin).fallbacks == []


@pytest.mark.parametrize("change", ["in_place", "data", "expert"])
def test_changed_weights_are_seen_by_pieces(recorder: AnyRecorder, change: str) -> None:
    own, twin = both("qwen3_moe", growing=True)
    for step in range(12):
        if step == 5:
            with torch.no_grad():
                for model in (own.model, twin.model):
                    {"in_place": _in_place, "data": _data, "expert": _expert}[change](model.model.layers[2])
        torch.testing.assert_close(twin(), own())
    assert recorder.replays > 0


@pytest.mark.parametrize("cache", [Kept, lambda config: StaticCache(config=config, max_cache_len=64, offloading=False)])
def test_caches_of_other_classes_and_layers_are_left_alone(recorder: AnyRecorder, cache: Callable[..., Any]) -> None:
    own, twin = both("qwen3_moe", growing=True)
    for step in (own, twin):
        step.cache, step.position = cache(config=step.model.config), 0
        if cache is not Kept:
            step.cache.layers[1].__class__ = type("Other", (type(step.cache.layers[1]),), {})
        step(5)
    for _ in range(5):
        torch.testing.assert_close(twin(), own())
    assert recorder.attempts == 0


def test_off_records_nothing(recorder: AnyRecorder) -> None:
    model = families.build("qwen3_moe").to(DEVICE)
    glowplug.compile(model, compiler="eager", cuda_graphs="off", cache_dir="off")
    generate(model, prompt(1, 5))
    assert recorder.attempts == 0


def _in_place(layer: Any) -> None:
    layer.self_attn.q_proj.weight.mul_(0.5)


def _data(layer: Any) -> None:
    weight = layer.self_attn.q_proj.weight
    weight.data = weight.data.clone().mul_(0.5)


def _expert(layer: Any) -> None:
    weight = layer.mlp.experts.gate_up_proj
    weight.data = weight.data.clone().mul_(0.5)


@pytest.mark.parametrize("experts", ["inline", "opaque"])
@pytest.mark.parametrize("change", [_in_place, _data, _expert])
def test_changed_weights_are_seen(recorder: AnyRecorder, change: Callable[[Any], None], experts: str) -> None:
    own, twin = both("qwen3_moe", experts=experts)
    for step in range(12):
        if step == 5:
            with torch.no_grad():
                for model in (own.model, twin.model):
                    change(model.model.layers[2])
        torch.testing.assert_close(twin(), own())
    if DEVICE == "cuda" and experts == "opaque":  # in float32 transformers' own experts wait for the GPU
        assert recorder.replays == 0
    else:
        assert recorder.replays >= 6


def test_an_attribute_that_a_layer_reads_when_it_runs(recorder: AnyRecorder) -> None:
    """Attention reads some attributes of its layer at each step."""
    own, twin = both("qwen3_moe")
    for _ in range(4):
        torch.testing.assert_close(twin(), own())
    replays = recorder.replays
    twin.model.model.layers[1].self_attn.mark = 2  # something else, which glowplug can't know to be harmless
    torch.testing.assert_close(twin(), own())
    assert recorder.replays == replays


def test_a_weight_that_moves_each_time_is_given_up(recorder: AnyRecorder) -> None:
    own, twin = both("qwen3_moe")
    for _ in range(14):
        for model in (own.model, twin.model):
            _data(model.model.layers[1])
            model.model.layers[1].self_attn.q_proj.weight.data.mul_(2)
        torch.testing.assert_close(twin(), own())
    assert recorder.attempts <= 3
    assert any("CUDA graph" in fallback.reason for fallback in glowplug.report(twin.model).fallbacks)


def test_another_cache_has_recordings_of_its_own(recorder: AnyRecorder) -> None:
    own, twin = both("qwen3_moe")
    for _ in range(4):
        torch.testing.assert_close(twin(), own())
    others = [Steps(step.model) for step in (own, twin)]
    for step in others:
        step(5)
    for _ in range(4):
        torch.testing.assert_close(others[1](), others[0]())
        torch.testing.assert_close(twin(), own())
    assert len(recorder.recordings) == 2


def test_a_cache_takes_over_the_memory_of_one_that_is_gone(recorder: AnyRecorder) -> None:
    own, twin = both("qwen3_moe")
    for _ in range(4):
        torch.testing.assert_close(twin(), own())
    memory = twin.cache.layers[1].keys
    for step in (own, twin):
        step.cache, step.position = StaticCache(config=step.model.config, max_cache_len=64), 0
        step(7)
    for _ in range(4):
        torch.testing.assert_close(twin(), own())
    assert len(recorder.recordings) == 1 and twin.cache.layers[1].keys is memory


def test_the_memory_of_a_large_cache_is_not_kept(recorder: AnyRecorder) -> None:
    recorder.budget = 2000
    own, twin = both("qwen3_moe")
    for _ in range(4):
        torch.testing.assert_close(twin(), own())
    graphs = glowplug.engine.engine_of(twin.model).compilation.graphs
    assert len(graphs._groups) == len(recorder.recordings) == 1
    del twin.cache
    gc.collect()
    assert not graphs._groups


def test_another_batch_size_is_another_form(recorder: AnyRecorder) -> None:
    own, twin = compiled("qwen3_moe")
    for batch in (1, 3):
        five_steps(own, twin, batch)
    assert len(recorder.recordings) == 2


def test_the_answer_is_the_callers_own(recorder: AnyRecorder) -> None:
    own, twin = both("qwen3_moe")
    pairs = [(twin(), own()) for _ in range(6)]
    for logits, expected in pairs:
        torch.testing.assert_close(logits, expected)


def test_inference_mode_and_back(recorder: AnyRecorder) -> None:
    own, twin = both("gpt_oss")
    for step in range(9):
        with torch.inference_mode(step % 3 == 2):
            torch.testing.assert_close(twin(), own())
    assert recorder.replays >= 6


def test_what_waits_for_the_gpu_is_not_recorded(recorder: AnyRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    own, twin = both("qwen3_moe")
    ops = importlib.import_module("glowplug.ops.attention")
    inner = ops.layer_index
    monkeypatch.setattr(ops, "layer_index", lambda layer: int(torch.tensor(inner(layer), device=DEVICE)))
    for _ in range(5):
        torch.testing.assert_close(twin(), own())
    assert recorder.attempts == 1 and recorder.replays == 0
    assert any("is recorded in no CUDA graph" in fallback.reason for fallback in glowplug.report(twin.model).fallbacks)


def test_memory_is_limited(recorder: AnyRecorder) -> None:
    recorder.budget = 1000
    own, twin = compiled("qwen3_moe")
    for batch in (1, 2):
        kept = five_steps(own, twin, batch)  # its cache lives on
    assert len(recorder.recordings) == 1 and kept
    assert any("MiB" in fallback.reason for fallback in glowplug.report(twin).fallbacks)


@pytest.mark.parametrize(
    "way", [{"num_beams": 3}, {"do_sample": True, "temperature": 0.7}, {"num_return_sequences": 2}]
)
def test_ways_to_generate(recorder: AnyRecorder, way: dict[str, Any]) -> None:
    own, twin = compiled("qwen3_moe")
    ids = prompt(2, 5)
    if "num_return_sequences" in way:
        way = way | {"do_sample": True}
    outputs = []
    for model in (own, twin):
        torch.manual_seed(0)
        outputs.append(generate(model, ids, **way))
    assert torch.equal(*outputs)
    assert recorder.attempts > 0


class OnePiece:
    """A program of one piece, as far as its graphs look at it."""

    def __init__(self, piece: Callable[..., Any], weight: torch.Tensor) -> None:
        self.names = {"WEIGHTS": (weight,)}
        self.piece = piece
        self.run: Any = None

    def wrapped(self, wrap: Callable[[int, Any], Any]) -> OnePiece:
        """See `Program.wrapped`."""
        self.run = wrap(0, self.piece)
        return self


def test_a_piece_is_replayed_only_for_arguments_like_those_that_were_recorded(recorder: AnyRecorder) -> None:
    weight = torch.randn(4, device=DEVICE)
    program: Any = OnePiece(lambda x, n, w: (x * n + w,), weight)
    graphs = PieceGraphs(program, recorder, Reads((weight,), ()), Report())
    assert [graphs.begin(1) for _ in range(3)] == [False, True, True]
    for rows, n in [(2, 2), (2, 2), (2, 3), (3, 2)]:
        x = torch.randn(rows, 4, device=DEVICE)
        torch.testing.assert_close(program.run(x, n, weight)[0], x * n + weight)
    assert len(recorder.recordings) == 1 and recorder.replays == 2
