"""The watch on a model: what it says of a change, and that a change which was taken back is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import families
import glowplug
from glowplug.layers.watch import Watch, distinct_reads


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(1, 1, bias=False)
        self.table, self.sizes, self.scale = {"a": 1}, [1, 2], 2.0


@pytest.fixture
def block() -> Block:
    return Block().eval()


def replace_weight(block: Any) -> None:
    block.up.weight = nn.Parameter(block.up.weight.detach().clone())  # equal, but another


def swap_module(block: Any) -> None:
    block.up = nn.Linear(1, 1)


def add_hook(block: Any) -> None:
    block.up.register_forward_hook(lambda *_: None)


def set_attribute(block: Any) -> None:
    block.scale = 3.0


def set_equal_attribute(block: Any) -> None:
    block.scale = 2  # as eager computes another dtype with it


def grow_list(block: Any) -> None:
    block.sizes.append(3)


def set_item(block: Any) -> None:
    block.table["a"] = 2


def own_forward(block: Any) -> None:
    block.up.forward = torch.relu


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replace_weight, "weight of up changed"),
        (swap_module, "modules of the model changed"),
        (add_hook, "forward hooks of up changed"),
        (set_attribute, "scale of the model changed"),
        (set_equal_attribute, "scale of the model changed"),
        (grow_list, "sizes of the model changed"),
        (set_item, "a of the model's dict changed"),
        (own_forward, "forward of up changed"),
        (nn.Module.train, "training of the model changed"),
    ],
)
def test_a_change_is_told_until_it_is_taken_back(block: Block, change: Any, words: str) -> None:
    watch = Watch(block, ["L['model'].scale", "L['model'].sizes[0]", "L['model'].table['a']"])
    assert watch.change() is None
    modules = [(module, dict(vars(module))) for module in block.modules()]
    tables = [(table, dict(table)) for _, kept in modules for table in kept.values() if isinstance(table, dict)]
    change(block)
    assert watch.change() == watch.change() == words
    del block.sizes[2:]
    for table, before in [*tables, *((vars(module), kept) for module, kept in modules)]:
        table.clear()
        table.update(before)
    assert watch.change() is None


@pytest.mark.parametrize("family", ["glm4_moe", "gpt_oss", "deepseek_v3", "llama4"])
def test_distinct_reads_watch_all_that_the_trace_read(family: str) -> None:
    """A record keeps only these."""
    model = families.build(family, layers=6)
    glowplug.compile(model, compiler="eager")
    with torch.no_grad():
        model(families.prompt(1, 3))
    reads = model.forward.compilation.reads
    distinct = distinct_reads(model, reads)
    assert set(distinct) < reads
    assert len(distinct) < len(reads) / 2

    def watched(sources: Any) -> list[str]:
        entries = Watch(model, sources)._entries.values()
        return sorted(f"{entry.key} of {entry.text}, {entry.read}, {entry.whole}" for entry in entries)

    assert watched(distinct) == watched(reads) != watched([])
