"""Weights that are replaced after the start."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

NORM = "layers.{}.input_layernorm.weight"
NO_PREFIXES = {"enable_prefix_caching": False}


def differ(reference: Any) -> bool:
    """Whether every edit changed the tokens."""
    return all(before != after for before, after in itertools.pairwise([reference.tokens, *reference.after]))


def test_replaced_weights_are_seen(vllms: Any, tmp_path: Path) -> None:
    """New values in place, new memory of a parameter, and another parameter, in layers and outside of them: every
    generation has the tokens of an uncompiled vLLM with the same change, and nothing is logged."""
    model = vllms.model("qwen3_moe", num_hidden_layers=12)
    edits = [
        ["in_place", NORM.format(5), 1],
        ["data", NORM.format(11), 2],
        ["parameter", NORM.format(0), 3],
        ["parameter", "layers.7.post_attention_layernorm.weight", 4],
        ["parameter", "norm.weight", 6],
        ["in_place", "norm.weight", 7],
    ]
    reference = vllms.reference(model, engine=NO_PREFIXES, edits=edits)
    assert differ(reference)
    outcome = vllms.start(model, vllms.warm(model, tmp_path / "cache"), engine=NO_PREFIXES, edits=edits)
    assert outcome.says("stamped 12 layers")
    assert outcome.tokens == reference.tokens
    for edit, ours, theirs in zip(edits, outcome.after, reference.after, strict=True):
        assert ours == theirs, edit
    assert outcome.lines_after == [[]] * len(edits)


def test_a_weight_of_another_form_is_never_read_wrongly(vllms: Any, tmp_path: Path) -> None:
    """A weight of another dtype than the program was compiled for: calls run uncompiled, one line warns, and the tokens
    are right; once it has its old dtype again, the program serves again."""
    model = vllms.model("qwen3_moe", num_hidden_layers=12)
    edits = [
        ["parameter", NORM.format(9), 1, "bfloat16"],
        ["in_place", NORM.format(3), 2],
        ["parameter", NORM.format(9), 3],
    ]
    reference = vllms.reference(model, engine=NO_PREFIXES, edits=edits)
    assert differ(reference)
    outcome = vllms.start(model, vllms.warm(model, tmp_path / "cache"), engine=NO_PREFIXES, edits=edits)
    for edit, ours, theirs in zip(edits, outcome.after, reference.after, strict=True):
        assert ours == theirs, edit
    (line,), *later = outcome.lines_after
    assert "run uncompiled" in line and "replaced by one of another form" in line
    assert later == [[], []]


def test_replaced_modules_are_seen(vllms: Any, tmp_path: Path) -> None:
    """Another module with another weight in the place of a layer's norm, and of the norm after the layers."""
    model = vllms.model("qwen3_moe", num_hidden_layers=12)
    edits = [["module", "layers.8.input_layernorm", 5], ["module", "norm", 6]]
    reference = vllms.reference(model, engine=NO_PREFIXES, edits=edits)
    assert differ(reference)
    outcome = vllms.start(model, vllms.warm(model, tmp_path / "cache"), engine=NO_PREFIXES, edits=edits)
    for edit, ours, theirs in zip(edits, outcome.after, reference.after, strict=True):
        assert ours == theirs, edit
