"""On a CUDA GPU: the kernel of `glowplug::expert_linear` for every number of pairs, and models that go through it.
Skipped elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import families
import glowplug
from experts import TOLERANCES, Inputs, draw, error
from glowplug.frontends.hf import discover
from glowplug.ops import expert_linear as room
from glowplug.ops.expert_linear import FEW, expert_linear, has_kernel

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_kernel(torch.device("cuda")), reason="needs a CUDA GPU and Triton"
)

PAIRS = (1, 3, 4, 8, 15, 16, 17, 33, 64, 65, 100, 256, 257, FEW)


def run(inputs: Inputs) -> torch.Tensor:
    return expert_linear(*vars(inputs).values())


@pytest.fixture
def kernel_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the kernel runs."""

    def refuse(*_: Any) -> None:
        raise AssertionError("not the kernel")

    for name in ("_grouped", "_gathered"):
        monkeypatch.setattr(room, name, refuse)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("experts", [3, 32, 160])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_number_of_pairs(pairs: int, experts: int, dtype: torch.dtype, kernel_only: None) -> None:
    for transposed, bias in ((False, False), (True, True)):
        for ids in ("random", "one", "strange"):
            options: dict[str, Any] = {"transposed": transposed, "bias": bias, "ids": ids, "dtype": dtype}
            inputs = draw(pairs, experts, 96, 144, device="cuda", **options)
            torch.full((pairs, 96), float("nan"), device="cuda", dtype=dtype)  # the memory that the output will take
            assert error(run(inputs), inputs) < TOLERANCES[dtype], options


@pytest.mark.parametrize("n, k", [(1, 1), (33, 50), (64, 128), (257, 515), (2880, 2880)])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("transposed", [False, True])
def test_any_width(n: int, k: int, dtype: torch.dtype, transposed: bool, kernel_only: None) -> None:
    for pairs in (8, 256):
        inputs = draw(pairs, 8, n, k, top_k=4, bias=True, dtype=dtype, transposed=transposed, device="cuda")
        assert error(run(inputs), inputs) < TOLERANCES[dtype]


def test_int32_and_unaligned(kernel_only: None) -> None:
    inputs = draw(24, 8, 96, 144, top_k=4, bias=True, device="cuda")
    experts = torch.cat([torch.zeros(1, device="cuda", dtype=torch.int32), inputs.experts.int()])[1:]
    x = torch.cat([torch.zeros(1, device="cuda"), inputs.input.flatten()])[1:].view_as(inputs.input)
    unaligned = Inputs(**{**vars(inputs), "experts": experts, "input": x})
    assert error(run(unaligned), unaligned) < 1e-5


def test_weights_past_two_to_the_31_elements(kernel_only: None) -> None:
    weight = torch.empty(160, 4096, 4096, dtype=torch.bfloat16, device="cuda")  # 2.7e9
    weight[[0, 159]] = torch.randn(2, 4096, 4096, device="cuda").bfloat16()
    inputs = draw(8, 2, 4096, 4096, dtype=torch.bfloat16, device="cuda")
    small = Inputs(**{**vars(inputs), "weight": weight[[0, 159]]})
    big = run(Inputs(**{**vars(inputs), "weight": weight, "experts": inputs.experts * 159}))
    assert error(big, small) < 1e-2


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ids", ["random", "one", "strange"])
def test_many_pairs(dtype: torch.dtype, transposed: bool, ids: str) -> None:
    options: dict[str, Any] = {"dtype": dtype, "transposed": transposed, "ids": ids}
    for n in (96, 33):
        inputs = draw(4 * 400, 16, n, 144, top_k=4, bias=True, device="cuda", **options)
        assert error(run(inputs), inputs) < TOLERANCES[dtype]


@pytest.mark.parametrize("pairs", [*PAIRS, 1600])
def test_twice_the_same(pairs: int) -> None:
    inputs = draw(pairs, 32, 960, 720, dtype=torch.bfloat16, transposed=True, bias=True, device="cuda")
    assert torch.equal(run(inputs), run(inputs))


@pytest.mark.parametrize("pairs", [4, 64, 256, FEW, 1600])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_recorded_and_replayed(pairs: int, dtype: torch.dtype) -> None:
    inputs = draw(pairs, 32, 96, 144, dtype=dtype, transposed=True, bias=True, device="cuda")
    run(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(inputs)
    for ids in ("random", "one", "strange", "random"):
        other = draw(pairs, 32, 96, 144, dtype=dtype, transposed=True, bias=True, ids=ids)
        inputs.experts.copy_(other.experts)
        inputs.input.copy_(other.input)
        output.fill_(float("nan"))
        graph.replay()
        assert error(output, inputs) < TOLERANCES[dtype]


def test_few_compilations() -> None:
    """Another number of pairs or rows of the same class compiles nothing."""
    from glowplug.ops.triton_kernels import _expert_linear

    def compiled() -> int:
        return sum(len(cache[0]) for cache in _expert_linear.device_caches.values())

    for pairs, top_k in ((4, 4), (20, 4)):
        run(draw(pairs, 32, 112, 176, top_k=top_k, dtype=torch.bfloat16, device="cuda"))
    before = compiled()
    for pairs, top_k in ((1, 1), (2, 2), (5, 1), (16, 1), (16, 4), (17, 1), (32, 4), (48, 8), (64, 1), (64, 16)):
        run(draw(pairs, 32, 112, 176, top_k=top_k, dtype=torch.bfloat16, device="cuda"))
    assert compiled() == before


@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_a_model(family: str, compiler: str) -> None:
    own, model = (families.build(family, layers=8).to("cuda") for _ in range(2))
    assert discover.plan(model, "inline").implementation == discover.BY_EXPERT
    glowplug.compile(model, compiler=compiler, experts="inline")
    settings: dict[str, Any] = {
        "max_new_tokens": 16,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    for batch in (1, 3):
        prompt = families.prompt(batch, 9).cuda()
        expected = own.generate(prompt, **settings)
        output = model.generate(prompt, **settings)
        assert torch.equal(output.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), rtol=1e-3, atol=1e-3)
    report = glowplug.report(model)
    assert (report.strategy, report.experts, report.fallbacks) == ("stamped", "inline", [])
