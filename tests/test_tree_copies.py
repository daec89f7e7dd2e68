"""The one copier of modules: what a copy shares with the module that it was made of, and what it has of its own."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from torch import nn

from glowplug.errors import NotStampableError
from glowplug.layers.copies import TreeCopy, make_twin, shallow_copy


class Settings:
    def __init__(self, inner: Settings | None = None) -> None:
        self.size, self.inner = 1, inner


class Holder(nn.Module):
    """Holds modules, settings and functions of other modules in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings(Settings())
        shared = nn.Linear(2, 2)
        self.first, self.second = nn.Sequential(shared), nn.Sequential(shared)
        self.register_buffer("seen", torch.zeros(2))
        object.__setattr__(self, "hidden", shared)
        self.bound = types.MethodType(lambda module: module, shared)
        self.partial = functools.partial(lambda module, more: (module, more), shared, more=1)


def test_a_tree_copy_shares_weights_and_nothing_else() -> None:
    model = Holder()
    before = dict(model.__dict__)
    copied = TreeCopy(model, configs=(Settings,))
    made: Any = copied.root
    linear = made.first[0]
    assert linear is made.second[0] is made.hidden is made.bound() is made.partial()[0] is not model.hidden
    assert linear.weight is model.hidden.weight and made.seen is model.seen
    made.settings.inner.size = 2
    assert (model.settings.inner.size, len(copied.configs)) == (1, 2)
    assert copied.of({"linear": model.hidden, "another": nn.Linear(2, 2)}) == {"linear": linear}
    assert model.__dict__ == before


def test_a_tree_copy_of_some_modules() -> None:
    model = Holder()
    made: Any = TreeCopy(model, into=lambda module: isinstance(module, nn.Sequential)).root
    assert made.first is not model.first and made.first[0] is model.first[0] is made.hidden
    assert made.settings is model.settings


def test_a_shallow_copy_has_children_of_its_own() -> None:
    model = Holder()
    made: Any = shallow_copy(model)
    del made._modules["second"]
    assert made.first is model.first and model.second is not None


def test_a_twin_has_a_state_of_its_own() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    twin: Any = make_twin(model)
    twin.model[0].running_mean.add_(1)
    assert twin.model[0].weight is model[0].weight
    assert model[0].running_mean.tolist() == [0, 0]
    assert twin.state["0"]["_buffers"]["running_mean"].tolist() == [1, 1]


def test_what_cannot_be_copied_has_no_twin() -> None:
    class Refuses:
        def __deepcopy__(self, memo: object) -> None:
            raise TypeError("no")

    model = Holder()
    model.__dict__["refuses"] = Refuses()
    with pytest.raises(NotStampableError, match="can't be copied"):
        make_twin(model)
