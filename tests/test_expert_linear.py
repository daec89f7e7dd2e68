"""`glowplug::expert_linear` without its kernel, and traces of models whose experts go through it, on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import families
import glowplug
from experts import TOLERANCES, draw, error
from glowplug.frontends.hf import discover
from glowplug.ops import expert_linear as room
from glowplug.ops.expert_linear import FEW, config_of, expert_linear, has_kernel

OP = torch.ops.glowplug.expert_linear.default


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("ids", ["random", "one", "strange"])
def test_against_float64(transposed: bool, bias: bool, dtype: torch.dtype, ids: str) -> None:
    inputs = draw(24, 5, 33, 50, top_k=3, transposed=transposed, bias=bias, dtype=dtype, ids=ids)
    assert error(expert_linear(*vars(inputs).values()), inputs) < TOLERANCES[dtype]


def test_the_memory_of_gathered_weights_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_GATHERED_BYTES", 3 * 33 * 50 * 4)
    inputs = draw(100, 5, 33, 50, top_k=4, bias=True, ids="strange")
    assert error(expert_linear(*vars(inputs).values()), inputs) < 1e-5


def test_no_pairs() -> None:
    inputs = draw(0, 5, 33, 50)
    assert expert_linear(*vars(inputs).values()).shape == (0, 33)


@pytest.mark.parametrize("transposed", [False, True])
def test_sorted_for_a_grouped_product(transposed: bool) -> None:
    """What many pairs go through on a GPU."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("needs grouped_mm")
    inputs = draw(96, 5, 32, 64, top_k=4, transposed=transposed, bias=True, dtype=torch.bfloat16, ids="strange")
    inputs.experts[inputs.experts < 0] = 0
    assert error(room._grouped(*vars(inputs).values()), inputs) < 1e-2


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": 2},
        {"transposed": True},
        {"bias": torch.zeros(5, 32)},
        {"input": torch.zeros(24, 50, dtype=torch.float64)},
        {"input": torch.zeros(24, 1, 50)},
        {"experts": torch.zeros(24, dtype=torch.int16)},
    ],
    ids=str,
)
def test_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expert_linear"):
        expert_linear(*(vars(draw(24, 5, 33, 50)) | change).values())


def test_the_op_is_registered_as_torch_wants_it() -> None:
    inputs = draw(24, 5, 33, 50, top_k=3, bias=True)
    torch.library.opcheck(OP, tuple(vars(inputs).values()), test_utils=("test_schema", "test_faketensor"))


def test_sizes_stay_symbolic() -> None:
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def run(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
        return expert_linear(x, weight, experts.reshape(-1), None, experts.shape[1], False)

    weight = torch.randn(5, 8, 16)
    for tokens in (3, 7, 300):
        experts = torch.randint(0, 5, (tokens, 2))
        assert run(torch.randn(tokens, 16), weight, experts).shape == (2 * tokens, 8)
    assert len(graphs) == 1


def test_configurations() -> None:
    """Few of them: each is a compilation; and each fits in the memory of any GPU."""
    for experts in (8, 32, 128, 160):
        for size in (2, 4):
            configs = {config_of(pairs, experts, 5760, 2880, True, size) for pairs in range(1, FEW + 1)}
            assert len(configs) <= 4
            for config in configs:
                assert 16 <= config.block_m <= config.pairs
                assert not config.by_pair or config.pairs <= experts
                block = (config.block_m + config.block_n) * config.block_k * size
                assert block * (config.stages - 1) < 99 << 10
    assert not has_kernel(torch.device("cpu"))


# -- models --------------------------------------------------------------------------------------------------------


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any device is taken for one with the kernel."""
    monkeypatch.setattr(discover, "has_kernel", lambda device: True)


def constants(graphs: list[fx.Graph]) -> set[tuple[Any, ...]]:
    """What the calls of the op get that is no value of a graph."""
    calls = [node.args for graph in graphs for node in graph.nodes if node.target is OP]
    return {tuple(a for a in args if not isinstance(a, fx.Node)) for args in calls}


@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe", "qwen3_moe", "mixtral", "deepseek_v3"])
def test_a_model_stamps_and_agrees(family: str, forced: None, graphs: list[fx.Graph]) -> None:
    own, model = families.build(family, layers=8), families.build(family, layers=8)
    glowplug.compile(model, compiler="eager", experts="inline")
    settings = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected, output = (each.generate(families.prompt(2, 9), **settings) for each in (own, model))
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
    report = glowplug.report(model)
    assert (report.strategy, report.experts, report.fallbacks) == ("stamped", "inline", [])
    if family == "gpt_oss":
        assert constants(graphs) == {(2, True), (1, True)}
    else:
        assert constants(graphs) == {(None, 2, False), (None, 1, False)}
    assert report.template_layers is not None
    assert report.template_layers < 8


def test_pieces_are_as_many_at_any_depth(forced: None) -> None:
    counts = []
    for layers in (4, 8):
        model = families.build("gpt_oss", layers=layers)
        glowplug.compile(model, compiler="eager", experts="inline")
        with torch.no_grad():
            model(families.prompt())
        counts.append(glowplug.report(model).distinct_pieces)
    assert counts[0] == counts[1]


def implementation(model: Any, choice: str = "inline") -> str | None:
    return discover.plan(model, choice).implementation


def test_the_comparison_with_eager_rounds_as_eager_does(forced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run without the kernel, and what serves runs with it."""
    modes: list[bool] = []
    own = room._gathered

    def gathered(*args: Any) -> Tensor:
        modes.append(room._mode.without_kernel)
        return own(*args)

    monkeypatch.setattr(room, "_gathered", gathered)
    model = families.build("qwen3_moe")
    glowplug.compile(model, compiler="eager", cache_dir="off")
    ids = families.prompt(1, 5)
    with torch.no_grad():
        model(ids)
        assert set(modes) == {True, False} and glowplug.report(model).fallbacks == []
        modes.clear()
        model(ids)
    assert set(modes) == {False}


def test_on_a_cpu_nothing_changes() -> None:
    assert implementation(families.build("qwen3_moe")) == "grouped_mm"


def test_who_gets_the_kernel(forced: None) -> None:
    model = families.build("qwen3_moe")
    assert implementation(model) == discover.BY_EXPERT
    for own, expected in (("batched_mm", discover.BY_EXPERT), ("eager", discover.BY_EXPERT)):
        model.set_experts_implementation(own)
        assert implementation(model) == expected
    assert implementation(model, "opaque") == discover.NAME
    assert implementation(families.build("llama4")) is None  # its experts bypass transformers' interface


@pytest.mark.parametrize("change", ["hook", "forward", "dtype", "quantised", "subclass", "one missing"])
def test_who_keeps_what_it_has(change: str, forced: None) -> None:
    model = families.build("qwen3_moe")
    layer: Any = next(iter(discover.experts_layers(model).values()))
    if change == "hook":
        layer.register_forward_hook(lambda *_: None)
    elif change == "forward":
        layer.forward = layer.forward
    elif change == "dtype":
        layer.down_proj.data = layer.down_proj.data.double()
    elif change == "quantised":
        layer.gate_up_proj = nn.Parameter(torch.zeros(4, 64, 64, dtype=torch.int8), requires_grad=False)
    elif change == "subclass":
        layer.down_proj = nn.Parameter(layer.down_proj.data.as_subclass(Odd))
    else:
        del layer.gate_up_proj
    assert implementation(model) == "grouped_mm"


class Odd(Tensor):
    """A tensor of a class of its own."""
