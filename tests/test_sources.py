"""Dynamo's names for what a trace reads: taken apart, followed, and found out when a torch writes them otherwise."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from glowplug.errors import UnsupportedTorchError
from glowplug.graph import capture as capturing
from glowplug.graph import sources
from glowplug.graph.sources import (
    Access,
    Source,
    attributes_in,
    is_weight,
    layer_index,
    lies_in,
    named,
    parse,
    size_of,
)

LAYER = "L['model']._modules['layers']._modules['3']"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("L['x']", Source("x")),
        ("L['x'].size()[1]", Source("x", size=1)),
        ("L['tensors'][2].size()[0]", Source("tensors", path=(Access("item", 2),), size=0)),
        ("type(L['m'].a)", Source("m", path=(Access("attribute", "a"), Access("call", "type")))),
        ("dict(L['m'].__dict__)['a']", Source("m", path=(Access("attribute", "a"),))),
        ("G['__import_torch_dot_nn'].Linear", Source("torch.nn", True, (Access("attribute", "Linear"),))),
        ("G['__builtins_dict___0']['len']", None),
        ("list(dict.keys(L['m'].table))[0]", None),
        ("object.__getattribute__(L['m'], 'a')", Source("m", path=(Access("attribute", "a"),))),
        ("dict.__getitem__(L['m'], 'a')", Source("m", path=(Access("item", "a"),))),
        ("L['m'].f()", None),
        ("Local(m)", None),
        ("", None),
        ("L['m", None),
    ],
)
def test_a_name_is_taken_apart(text: str, expected: Source | None) -> None:
    assert parse(text) == expected


def test_a_name_is_followed() -> None:
    model = SimpleNamespace(a={"b": [1.5]})
    assert Source("m", path=parse("L['m'].a['b'][0]").path).value({"m": model}) == 1.5  # type: ignore[union-attr]
    assert parse("G['__import_torch_dot_nn'].Linear").value({}) is torch.nn.Linear  # type: ignore[union-attr]
    for wrong in ("L['m'].a['c']", "L['m'].gone", "L['other']", "G['__import_gone']", "L['m'].a.b.c"):
        with pytest.raises(LookupError):
            parse(wrong).value({"m": model})  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("L['model'].a.scale.b", [("L['model'].a", "scale")]),
        ("L['model'].a.__dict__['scale']", [("L['model'].a", "scale")]),
        ("dict(L['model'].__dict__)['scale']", [("L['model']", "scale")]),
        ("L['model'].a.__dict__", [("L['model'].a", "__dict__")]),
        ("list(dict.keys(L['model'].scale))[0]", [("L['model']", "scale")]),
        ("f(L['model'].a).scale", [(None, "scale")]),
        ("type(L['model'].a).scale", [(None, "scale")]),
        ("L['model'.scale", [(None, "scale")]),
        ("f(L['model'].a)['scale']", [(None, "scale")]),
        ("object.__getattribute__(L['model'].a, 'scale')", [("L['model'].a", "scale")]),
        ("object.__getattribute__(f(), 'scale')", [(None, "scale")]),
        ("L['model'].rescale", []),
    ],
)
def test_attributes_and_whose_they_are(text: str, expected: list[tuple[str | None, str]]) -> None:
    found = list(attributes_in(text, ("scale",)))
    assert found == [(parse(owner) if owner is not None else None, name) for owner, name in expected]


def test_questions() -> None:
    weight = f"{LAYER}._parameters['weight']"
    assert is_weight(weight) and is_weight("L['m']._buffers['b']") and not is_weight(f"{LAYER}.scale")
    assert layer_index(weight) == 3 and layer_index("L['model']._modules['norm']") is None
    assert lies_in(weight, "layers") and lies_in(weight, "") and not lies_in(weight, "model.norms")
    assert not lies_in("L['model'].scale", "")
    assert size_of("L['cache'].past.size()[0]") == ("L['cache'].past", 0) and size_of(weight) is None
    assert named(weight) == "model.layers.3.weight"


# -- another grammar -----------------------------------------------------------------------------------------


def double(x: Tensor) -> Tensor:
    return 2 * x


def _trace() -> Any:
    return capturing.capture(double, (torch.ones(3),), lambda captured: len(captured.inputs))


@pytest.fixture
def unchecked() -> Any:
    """As in a process that has captured nothing."""
    capturing._check_names.cache_clear()
    yield
    capturing._check_names.cache_clear()


def test_this_torch_is_known_and_checked_once(unchecked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[int] = []
    check = sources.Probe.check
    monkeypatch.setattr(sources.Probe, "check", lambda self, *args: checks.append(1) or check(self, *args))
    assert _trace() == _trace() == 1
    assert checks == [1]


@pytest.mark.parametrize(
    ("other", "missing"),
    [
        (lambda text: text.replace("L['", "local('").replace("']", "')"), "attributes, types, globals"),
        (lambda text: text.replace(".scale", ".attribute('scale')"), "attributes"),
        (lambda text: text.replace("type(", "typeof("), "types"),
        (lambda text: text.replace("__import_", "module:"), "globals"),
        (lambda text: "", "attributes, types, globals"),
    ],
)
def test_another_grammar_is_an_error(
    unchecked: None, monkeypatch: pytest.MonkeyPatch, other: Callable[[str], str], missing: str
) -> None:
    read_by = sources.read_by
    monkeypatch.setattr(sources, "read_by", lambda guard: other(read_by(guard)))
    for _ in range(2):  # it stays one
        with pytest.raises(UnsupportedTorchError, match=rf"names the {missing} that a trace reads .* 2\.11 and 2\.13"):
            _trace()


def test_other_names_of_inputs_are_an_error(unchecked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    describe = capturing.describe

    def renamed(gm: torch.fx.GraphModule, *handle: type) -> capturing.Captured:
        captured = describe(gm, *handle)
        for entry in captured.inputs:
            object.__setattr__(entry, "source", entry.source.replace("_modules[", "children["))
        return captured

    monkeypatch.setattr(capturing, "describe", renamed)
    with pytest.raises(UnsupportedTorchError, match="names the weights that"):
        _trace()
