"""The plug-in gives vLLM's tokens for every family, cold and warm."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import tiny

STAMPED = [family for family in tiny.FAMILIES if family != "deepseek_v3"]
COMPILED = {"gpt_oss"}
"""Families whose uncompiled tokens differ from those that vLLM compiles."""


@pytest.mark.parametrize("family", STAMPED)
def test_the_tokens_of_a_stamped_decoder_are_those_of_vllm(vllms: Any, family: str, tmp_path: Path) -> None:
    """A cold start traces a template shorter than the model, a warm one traces nothing, and both give the tokens of a
    vLLM without the plug-in."""
    model = vllms.model(family)
    reference = vllms.reference(model, eager=family not in COMPILED)
    assert reference.lines == [] and reference.distinct > 20
    cold, _ = vllms.cold(model)
    (line,) = cold.lines
    found = re.search(r"traced (\d+) of (\d+) layers, compiled (\d+) pieces(?: at once)?, stamped (\d+) layers", line)
    assert found is not None, line
    traced, layers, pieces, stamped = map(int, found.groups())
    assert traced < layers == stamped == tiny.FAMILIES[family][1]["num_hidden_layers"]
    assert pieces < 2 * traced
    assert cold.tokens == reference.tokens
    warm = vllms.start(model, vllms.warm(model, tmp_path / "cache"))
    (line,) = warm.lines
    assert re.search(rf"traced none of {layers} layers, loaded {pieces} pieces, stamped {layers} layers", line), line
    assert warm.tokens == reference.tokens
