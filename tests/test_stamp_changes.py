"""Changes to a stamped model after it was compiled: followed, or noticed, and never stale."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import families
import glowplug
from test_changes import FOLLOWED, INLINE, NOTICED, OPAQUE, Change, eager, quiet

TWO_LAYERS_ONLY = {"load_state_dict", "load_with_assign", "add_layer_type"}
"""Changes that are written for the two layers of the models in `test_changes`; loading is below."""
CHANGES = [change for change in (*FOLLOWED, *NOTICED) if change.__name__ not in TWO_LAYERS_ONLY]


@pytest.mark.parametrize("options", [INLINE, OPAQUE], ids=lambda options: options["experts"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_change_of_a_stamped_model(change: Change, options: dict[str, Any], stored: dict[str, Any]) -> None:
    model = glowplug.compile(families.build("gpt_oss", layers=8), verify="off", **stored, **options)
    before = quiet(model)
    assert glowplug.report(model).strategy == "stamped"
    change(model)
    expected = eager(model)
    assert not torch.equal(expected, before)
    for _ in range(2):
        torch.testing.assert_close(quiet(model), expected, rtol=1e-5, atol=1e-5)
    if change in FOLLOWED:
        assert glowplug.report(model).fallbacks == []


@pytest.mark.parametrize("assign", [False, True])
def test_loading_other_weights(assign: bool) -> None:
    model = glowplug.compile(families.build("gpt_oss", layers=8), compiler="eager")
    before = quiet(model)
    assert glowplug.report(model).strategy == "stamped"
    model.load_state_dict(families.build("gpt_oss", seed=9, layers=8).state_dict(), assign=assign)
    expected = eager(model)
    assert not torch.equal(expected, before)
    torch.testing.assert_close(quiet(model), expected, rtol=1e-5, atol=1e-5)
