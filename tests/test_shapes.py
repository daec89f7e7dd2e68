"""What a trace assumed of sizes is written down, and a call that breaks it is noticed and answered by eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import families
import glowplug
from glowplug.graph.capture import Captured, capture
from glowplug.graph.shapes import ShapeAssumptions, read_assumptions

X, Y = "L['x']", "L['y']"


def assumptions(fn: Callable[..., Any], *args: Tensor) -> ShapeAssumptions:
    def consume(captured: Captured) -> ShapeAssumptions:
        return read_assumptions(captured, {X, Y})

    return capture(fn, args, consume)  # type: ignore[arg-type]


def marked(*shape: int, dims: tuple[int, ...] = (0, 1)) -> Tensor:
    x = torch.randn(shape)
    for dim in dims:
        torch._dynamo.mark_dynamic(x, dim)
    return x


# -- the room itself ------------------------------------------------


def test_no_assumption_no_complaint() -> None:
    found = assumptions(lambda x: x * 2 + 1, marked(3, 5))
    for shape in ((1, 1), (2, 7), (1, 5), (3, 1), (512, 64)):
        assert found.broken_by({X: shape}) is None, shape


def test_fixed_dimension() -> None:
    found = assumptions(lambda x: x * 2, marked(3, 5, dims=(0,)))
    assert found.broken_by({X: (9, 5)}) is None
    reason = found.broken_by({X: (9, 6)})
    assert reason
    assert "6" in reason
    assert "5" in reason
    assert " of x is " in reason


def test_rank() -> None:
    found = assumptions(lambda x: x * 2, marked(3, 5))
    assert "3 dimensions" in str(found.broken_by({X: (1, 2, 3)}))


def test_equal_sizes() -> None:
    found = assumptions(lambda x, y: x + y, marked(3, 5), marked(3, 5))
    assert found.broken_by({X: (4, 6), Y: (4, 6)}) is None
    assert found.broken_by({X: (4, 6), Y: (4, 7)})


def branch_above(x: Tensor) -> Tensor:
    return x * 2 if x.shape[1] > 4 else x - 1


def branch_equal(x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] == x.shape[1] else x - 1


def branch_product(x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] * x.shape[1] >= 12 else x - 1


def branch_modulo(x: Tensor) -> Tensor:
    return x * 2 if x.shape[1] % 2 == 0 else x - 1


def branch_loop(x: Tensor) -> Tensor:
    for _ in range(x.shape[0]):
        x = x + 1
    return x


def branch_numel(x: Tensor) -> Tensor:
    return x * 2 if x.numel() < 100 else x - 1


BRANCHES = {
    branch_above: lambda rows, columns: columns > 4,
    branch_equal: lambda rows, columns: rows == columns,
    branch_product: lambda rows, columns: rows * columns >= 12,
    branch_modulo: lambda rows, columns: columns % 2 == 0,
    branch_loop: lambda rows, columns: rows,
    branch_numel: lambda rows, columns: rows * columns < 100,
}

SIZES = [(rows, columns) for rows in (1, 2, 3, 5, 8, 40) for columns in (1, 2, 3, 4, 5, 6, 8, 33)]


@pytest.mark.parametrize("fn", BRANCHES, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("traced", [(3, 6), (2, 3), (5, 7)], ids=str)
def test_a_call_on_the_other_side_of_a_branch_is_noticed(fn: Any, traced: tuple[int, int]) -> None:
    """For each size: where the branch would go elsewhere, the assumption must break. (The reverse may be strict.)"""
    try:
        found = assumptions(fn, marked(*traced))
    except glowplug.CaptureError:
        return  # refused: eager runs
    side = BRANCHES[fn]
    kept = 0
    for size in SIZES:
        if side(*size) != side(*traced):
            assert found.broken_by({X: size}) is not None, size
        else:
            kept += found.broken_by({X: size}) is None
    assert found.broken_by({X: traced}) is None
    if fn is not branch_loop:
        assert kept > 1  # not simply everything refused


def test_inputs_that_do_not_vary_are_not_looked_at() -> None:
    def consume(captured: Captured) -> ShapeAssumptions:
        return read_assumptions(captured, {X})

    found = capture(lambda x, y: x + y, [marked(3, 5), marked(3, 5)], consume)
    assert set(found.dims) == {X}


# -- whole models ------------------------------------------------


class Branching(type(families.build("qwen3", layers=2))):  # type: ignore[misc]
    """A model whose forward does something else above a number of tokens, or of sequences."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        output = super().forward(input_ids, **kwargs)
        if input_ids.shape[self.config.branch_dim] > self.config.branch_at:
            output.logits = output.logits * 2
        return output


def branching(at: int, dim: int = 1) -> PreTrainedModel:
    model = families.build("qwen3", layers=2)
    model.__class__ = Branching
    model.config.branch_at, model.config.branch_dim = at, dim
    return model


@pytest.mark.parametrize(("dim", "at"), [(1, 4), (1, 20), (1, 1), (1, 0), (0, 1), (0, 2)])
def test_a_model_that_branches_on_its_sizes_is_never_wrong(dim: int, at: int) -> None:
    """Sizes 0 and 1 leave no relation in a trace: the comparison before the program serves must find those."""
    model = branching(at, dim)
    glowplug.compile(model, compiler="eager")
    with torch.no_grad():
        for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 9, 20, 21, 40, 1, 5):
            for batch in (1, 2, 3):
                ids = families.prompt(batch, tokens)
                expected = Branching.forward(model, ids).logits
                torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_broken_assumption_is_reported_once() -> None:
    model = branching(20)
    glowplug.compile(model, compiler="eager")
    with torch.no_grad():
        model(families.prompt(1, 12))
        assert glowplug.report(model).fallbacks == []
        for _ in range(3):
            model(families.prompt(1, 30))
    (fallback,) = glowplug.report(model).fallbacks
    assert "30" in fallback.reason


def test_strict_raises_where_an_assumption_breaks() -> None:
    model = branching(20)
    glowplug.compile(model, compiler="eager", strict=True)
    with torch.no_grad():
        model(families.prompt(1, 12))
        with pytest.raises(glowplug.NotServableError, match="30"):
            model(families.prompt(1, 30))


def test_a_branch_on_the_length_of_the_cache() -> None:
    """Past lengths are symbolic, too: a model that changes its ways at 16 cached tokens must not be taken on trust."""

    class PastBranch(Branching):
        def forward(self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            output = super().forward(input_ids, past_key_values=past_key_values, **kwargs)
            if past > 15:
                output.logits = -output.logits
            return output

    model = branching(10_000)
    model.__class__ = PastBranch
    ids = families.prompt(1, 8)
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=20, do_sample=False)
        glowplug.compile(model, compiler="eager")
        assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), expected)


@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
def test_real_models_assume_nothing_of_their_sizes(family: str) -> None:
    model = families.build(family)
    glowplug.compile(model, compiler="eager")
    with torch.no_grad():
        for batch, tokens in ((1, 12), (1, 1), (8, 1), (3, 40), (2, 16), (1, 300)):
            ids = families.prompt(batch, tokens)
            expected = type(model).forward(model, ids).logits
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert glowplug.report(model).fallbacks == []
    assert glowplug.report(model).programs == 1
