"""`generate` in all its ways, on compiled models: token for token what the model's own eager forward gives."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel

import families
import glowplug
from glowplug import start
from glowplug.graph.capture import capture

WINDOW = 8  # of gpt_oss


@dataclass
class Pair:
    """A compiled model and its eager twin, with equal weights."""

    compiled: PreTrainedModel
    eager: PreTrainedModel

    def same(self, ids: Tensor | None = None, tokens: int = 16, **kwargs: Any) -> Tensor:
        """Generate with both, compare every token, and see that nothing ran eager."""
        outputs = []
        for model in (self.eager, self.compiled):
            torch.manual_seed(7)
            given = {name: copy.deepcopy(value) for name, value in kwargs.items() if value is not None}
            outputs.append(model.generate(ids, **{"max_new_tokens": tokens, "do_sample": False, **given}))
        assert torch.equal(*outputs)
        self.served()
        return outputs[1]

    def served(self) -> None:
        """Everything so far was served by the compiled program."""
        report = glowplug.report(self.compiled)
        assert report.fallbacks == []
        assert report.programs >= 1


KINDS = {
    "gpt_oss-hoisted": ("gpt_oss", {"identity": "hoisted"}),
    "glm4_moe-hoisted": ("glm4_moe", {"identity": "hoisted"}),
    "gpt_oss-ordered": ("gpt_oss", {"identity": "ordered", "experts": "opaque"}),
    "glm4_moe-ordered": ("glm4_moe", {"identity": "ordered", "experts": "opaque"}),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> Pair:
    family, options = KINDS[request.param]
    compiled, eager = families.build(family), families.build(family)
    glowplug.compile(compiled, compiler="eager", **options)
    return Pair(compiled, eager)


def padded(model: PreTrainedModel, lengths: tuple[int, ...] = (12, 3, 7)) -> dict[str, Tensor]:
    """A batch of prompts of several lengths, padded on the left."""
    longest = max(lengths)
    ids, mask = families.prompt(len(lengths), longest), torch.ones(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, : longest - length], mask[row, : longest - length] = model.config.pad_token_id, 0
    return {"ids": ids, "attention_mask": mask}


# -- caches and lengths ------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_dynamic_cache(pair: Pair, batch: int) -> None:
    pair.same(families.prompt(batch, 5))


def test_static_cache(pair: Pair) -> None:
    pair.same(families.prompt(2, 5), cache_implementation="static")
    pair.same(families.prompt(1, 20), cache_implementation="static")


def test_prompt_longer_than_the_window(pair: Pair) -> None:
    pair.same(families.prompt(1, 3 * WINDOW + 1))
    pair.same(families.prompt(2, WINDOW), cache_implementation="static", tokens=20)


def test_window_exceeded_while_decoding(pair: Pair) -> None:
    pair.same(families.prompt(1, WINDOW - 2), tokens=3 * WINDOW)


@pytest.mark.parametrize("tokens", [1, WINDOW - 1, WINDOW, WINDOW + 1])
def test_lengths_at_the_windows_edge(pair: Pair, tokens: int) -> None:
    pair.same(families.prompt(1, tokens), tokens=4)


def test_without_a_cache(pair: Pair) -> None:
    pair.same(families.prompt(2, 5), tokens=6, use_cache=False)


def test_left_padding(pair: Pair) -> None:
    batch = padded(pair.eager)
    together = pair.same(**batch)
    # Padding must matter, and must not leak: each row alone says the same.
    alone = pair.same(batch["ids"][1:2, -3:])
    assert torch.equal(together[1, 12:], alone[0, 3:])
    assert not torch.equal(together, pair.same(batch["ids"], attention_mask=torch.ones_like(batch["attention_mask"])))


def test_left_padding_with_a_static_cache(pair: Pair) -> None:
    pair.same(**padded(pair.eager), cache_implementation="static")


def test_a_second_turn_on_a_kept_cache(pair: Pair) -> None:
    first, more = families.prompt(1, 6), families.prompt(1, 4, seed=9)
    turns = []
    for model in (pair.eager, pair.compiled):
        one = model.generate(first, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([one.sequences, more], dim=1)
        two = model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=one.past_key_values)
        fresh = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(two, fresh)
        turns.append(two)
    assert torch.equal(*turns)
    pair.served()


def test_a_cache_may_change_hands(pair: Pair) -> None:
    """What eager wrote, the compiled program reads, and the other way round."""
    ids = families.prompt(2, 10)
    with torch.no_grad():
        expected = pair.eager(ids).logits[:, -1]
        for first, second in ((pair.eager, pair.compiled), (pair.compiled, pair.eager)):
            cache = DynamicCache(config=pair.eager.config)
            first(ids[:, :6], past_key_values=cache)
            output = second(ids[:, 6:], past_key_values=cache)
            assert output.past_key_values is cache
            torch.testing.assert_close(output.logits[:, -1], expected, rtol=1e-4, atol=1e-4)
    pair.served()


# -- ways of decoding ------------------------------------------------


def test_sampling_with_a_seed(pair: Pair) -> None:
    drawn = pair.same(families.prompt(3, 5), do_sample=True, top_k=20, temperature=1.5)
    greedy = pair.same(families.prompt(3, 5))
    assert not torch.equal(drawn, greedy)


def test_beam_search(pair: Pair) -> None:
    pair.same(families.prompt(2, 5), num_beams=3, tokens=8)
    pair.same(families.prompt(1, 12), num_beams=2, num_return_sequences=2, tokens=8)


def test_several_sequences_a_prompt(pair: Pair) -> None:
    pair.same(families.prompt(2, 5), do_sample=True, num_return_sequences=3, tokens=8)


def test_inputs_embeds(pair: Pair) -> None:
    with torch.no_grad():
        embeds = pair.eager.get_input_embeddings()(families.prompt(2, 6))
    pair.same(inputs_embeds=embeds, tokens=10)
    assert glowplug.report(pair.compiled).programs >= 2  # one for ids, one for embeddings


def test_prompt_lookup(pair: Pair) -> None:
    if pair.eager.config.model_type == "gpt_oss":
        pytest.skip("transformers can't roll back a sliding window")
    ids = families.prompt(1, 6).repeat(1, 3)
    looked_up = pair.same(ids, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, pair.same(ids))


@pytest.mark.parametrize("identity", ["hoisted", "ordered"])
def test_assisted_by_a_compiled_draft_model(identity: str) -> None:
    """A mixture-of-experts draft model runs inside the target's generation: the case that broke vLLM's order."""
    target, draft = families.build("glm4_moe"), families.build("mixtral", layers=2)
    ids = families.prompt(1, 7)
    alone = target.generate(ids, max_new_tokens=20, do_sample=False)
    expected = target.generate(ids, max_new_tokens=20, do_sample=False, assistant_model=draft)
    assert torch.equal(expected, alone)
    for model in (target, draft):
        glowplug.compile(model, compiler="eager", identity=identity, experts="opaque")
    output = target.generate(ids, max_new_tokens=20, do_sample=False, assistant_model=draft)
    assert torch.equal(output, alone)
    for model in (target, draft):
        assert glowplug.report(model).fallbacks == []
        assert glowplug.report(model).programs == 1


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_of_the_caller(pair: Pair, mode: Any) -> None:
    with mode():
        pair.same(families.prompt(2, 5))


@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe"])
def test_first_call_in_inference_mode(family: str) -> None:
    """Captured inside inference mode, used outside, and inside again."""
    model, ids = families.build(family, layers=2), families.prompt(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
    glowplug.compile(model, compiler="eager")
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(ids).logits, expected)
    assert glowplug.report(model).fallbacks == []


# -- one forward call ------------------------------------------------


def test_forms_of_a_forward_call(pair: Pair) -> None:
    ids, mask = families.prompt(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    square = torch.ones(9, 9).tril().bool().expand(2, 1, 9, 9)
    forms: list[dict[str, Any]] = [
        {},
        {"attention_mask": mask},
        {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)},
        {"attention_mask": torch.where(square, 0.0, torch.finfo(torch.float32).min)},
        {"logits_to_keep": 1},
        {"logits_to_keep": 4},
        {"logits_to_keep": 100},
        {"logits_to_keep": torch.tensor([0, 3, 8])},
        {"use_cache": False},
        {"return_dict": False},
        {"position_ids": torch.arange(9).unsqueeze(0) + 5},
        {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]] * 2)},
    ]
    with torch.no_grad():
        for form in forms:
            expected, output = pair.eager(ids, **form), pair.compiled(ids, **form)
            assert type(output) is type(expected), form
            assert output[0].shape == expected[0].shape, form
            torch.testing.assert_close(output[0], expected[0], rtol=1e-5, atol=1e-5, msg=str(form))
            if "return_dict" not in form:
                assert (output.past_key_values is None) == (expected.past_key_values is None), form
    pair.served()


def test_positional_arguments(pair: Pair) -> None:
    ids, mask = families.prompt(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    with torch.no_grad():
        assert torch.equal(pair.compiled(ids, mask).logits, pair.eager(ids, mask).logits)


def test_integer_types_of_ids(pair: Pair) -> None:
    ids = families.prompt(2, 9).int()
    with torch.no_grad():
        assert torch.equal(pair.compiled(ids).logits, pair.eager(ids).logits)


def test_inputs_that_are_not_contiguous(pair: Pair) -> None:
    ids = families.prompt(2, 18)[:, ::2]
    assert not ids.is_contiguous()
    with torch.no_grad():
        assert torch.equal(pair.compiled(ids).logits, pair.eager(ids).logits)


def test_the_interface_is_the_models_own(pair: Pair) -> None:
    import inspect

    assert inspect.signature(pair.compiled.forward) == inspect.signature(pair.eager.forward)
    assert list(pair.compiled.state_dict()) == list(pair.eager.state_dict())
    assert type(pair.compiled) is type(pair.eager)


# -- several at once ------------------------------------------------


@pytest.mark.parametrize("options", [{"identity": "hoisted"}, {"identity": "ordered", "experts": "opaque"}], ids=str)
def test_two_threads_on_two_models(options: dict[str, Any]) -> None:
    """From the first call on: both capture, then both decode, at the same time."""
    models = [families.build("gpt_oss", layers=2, seed=seed) for seed in (0, 1)]
    ids = families.prompt(1, 6)
    expected = [model.generate(ids, max_new_tokens=24, do_sample=False) for model in models]
    assert not torch.equal(*expected)
    for model in models:
        glowplug.compile(model, compiler="eager", **options)
    _generate_at_once([(models[i % 2], ids, expected[i % 2]) for i in range(2)])
    for model in models:
        assert glowplug.report(model).fallbacks == []


def test_four_threads_on_one_model(pair: Pair) -> None:
    jobs = []
    for number in range(4):
        ids = families.prompt(1, 4 + number, seed=number)
        jobs.append((pair.compiled, ids, pair.eager.generate(ids, max_new_tokens=24, do_sample=False)))
    _generate_at_once(jobs)
    pair.served()


@pytest.mark.parametrize("family", families.FAMILIES)
def test_other_threads_see_nothing_of_a_capture(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not its attention nor its experts, by which they would make other masks, and not its forwards."""
    model = families.build(family)
    ids = families.prompt(2, 5)

    def seen() -> list[Any]:
        config = model.config.get_text_config()
        forwards = [module.__dict__.get("forward") for module in model.modules() if module is not model]
        return [forwards, config._attn_implementation, getattr(config, "_experts_implementation", None)]

    before, during = seen(), []
    with torch.no_grad():
        expected = type(model).forward(model, ids).logits

    def watched(*args: Any) -> Any:
        def other_thread() -> None:
            with torch.no_grad():
                during.append((seen(), type(model).forward(model, ids).logits))

        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join(timeout=60)
        return capture(*args)

    monkeypatch.setattr(start, "capture", watched)
    glowplug.compile(model, compiler="eager", experts="opaque")
    model.generate(ids, max_new_tokens=2, do_sample=False)
    assert during
    for found, logits in during:
        assert found == before
        assert torch.equal(logits, expected)
    assert seen() == before


def _generate_at_once(jobs: list[tuple[PreTrainedModel, Tensor, Tensor]]) -> None:
    start, outputs = threading.Barrier(len(jobs), timeout=60), {}

    def work(number: int) -> None:
        model, ids, _ = jobs[number]
        start.wait()
        outputs[number] = model.generate(ids, max_new_tokens=24, do_sample=False)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert sorted(outputs) == list(range(len(jobs)))
    for number, (_, _, expected) in enumerate(jobs):
        assert torch.equal(outputs[number], expected)


# -- nothing compiles after the first token ------------------------------------------------


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe"])
def test_no_compilation_after_the_first_token(family: str, counting: Any) -> None:
    model = families.build(family)
    glowplug.compile(model, compiler=counting)
    model.generate(families.prompt(1, 3), max_new_tokens=1, do_sample=False)
    compiled, traced = counting.compiled, graphs()
    assert compiled == glowplug.report(model).distinct_pieces
    for batch, tokens in ((1, 1), (1, 2), (2, 1), (8, 1), (3, 17), (1, 128), (8, 64), (1, 512), (2, 333)):
        ids = families.prompt(batch, tokens)
        before = counting.ran
        model.generate(ids, max_new_tokens=3, do_sample=False)
        assert counting.ran - before == 3 * glowplug.report(model).pieces  # and every step was served
    model.generate(**padded_inputs(model), max_new_tokens=3, cache_implementation="static")
    assert counting.compiled == compiled
    assert graphs() == traced
    assert glowplug.report(model).fallbacks == []


def padded_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    batch = padded(model)
    return {"input_ids": batch["ids"], "attention_mask": batch["attention_mask"]}


@pytest.mark.inductor
def test_with_inductor() -> None:
    """The one compiled program of each size: prefill, decode, padding, both caches, one sequence and several."""
    compiled, eager = families.build("gpt_oss", layers=2), families.build("gpt_oss", layers=2)
    glowplug.compile(compiled)
    pair = Pair(compiled, eager)
    pair.same(families.prompt(1, 5), tokens=2)
    assert glowplug.report(compiled).compiler == "inductor"
    traced, compilations = graphs(), dict(counters["inductor"])
    misses = counters["aot_autograd"]["total"]
    for batch, tokens in ((1, 1), (2, 1), (8, 1), (1, 20), (3, 33), (1, 512)):
        ids = families.prompt(batch, tokens)
        with torch.no_grad():
            expected, output = eager(ids).logits, compiled(ids).logits
        assert float((output - expected).norm() / expected.norm()) < 1e-4
        pair.same(ids, tokens=12)
    pair.same(**padded(eager), tokens=12)
    pair.same(families.prompt(2, 7), cache_implementation="static", tokens=12)
    assert graphs() == traced
    assert dict(counters["inductor"]) == compilations
    assert counters["aot_autograd"]["total"] == misses


@pytest.mark.inductor
@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_with_inductor_and_opaque_experts(family: str) -> None:
    compiled, eager = families.build(family, layers=3), families.build(family, layers=3)
    glowplug.compile(compiled, experts="opaque")
    pair = Pair(compiled, eager)
    pair.same(families.prompt(2, 9), tokens=12)
    pair.same(families.prompt(1, 1), tokens=12)
