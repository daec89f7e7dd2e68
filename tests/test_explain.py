"""`glowplug.explain` of plain modules, and what a notebook shows of explanations and reports."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glowplug
from families import build
from glowplug.show.html import _colour, report_html
from glowplug.show.pieces import letter, read_programs

VOID = {"br", "hr", "img", "input", "link", "meta"}


class Block(nn.Module):
    """A residual layer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def make_net(depth: int = 8) -> nn.Sequential:
    """A stack inside a stack: the outer one holds three modules, the inner one the layers."""
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(*(Block() for _ in range(depth))), nn.Tanh()).eval()


class Text(HTMLParser):
    """Checks that tags are nested, and collects the text, the tags and the attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.titles: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.titles += [value or "" for name, value in attrs if name == "title"]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def shown(thing: Any) -> Text:
    """What a notebook shows. It needs no scripts, no styles of the page, and nothing from elsewhere."""
    page = Text(thing._repr_html_())
    assert page.tags <= {"div", "span", "b"}
    assert page.attributes <= {"style", "title"}
    assert "url(" not in thing._repr_html_()
    return page


# -- plain modules ------------------------------------------------


def test_a_plain_module_with_example_arguments_is_stamped() -> None:
    net = make_net()
    before = copy.deepcopy(net.state_dict())
    explained = glowplug.explain(net, torch.ones(3, 8))
    assert explained.kinds == (0,) * 8
    assert re.fullmatch(r"A \(B\)x8 \w", explained.layout)
    assert explained.pieces[1].layers == ("0", "1", "...", "7")
    assert explained.fallbacks == ()
    assert "forward" not in net.__dict__
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert "def run(" in glowplug.explain_program(net, torch.ones(3, 8))


def test_a_compiled_module_shows_what_it_runs() -> None:
    net = glowplug.compile(make_net(), compiler="eager")
    with pytest.raises(glowplug.UsageError, match="not called yet"):
        glowplug.explain(net)
    with torch.no_grad():
        net(torch.ones(3, 8))
    explained = glowplug.explain(net)
    assert explained.layout == glowplug.explain(net, torch.ones(3, 8)).layout
    assert explained.kinds == (0,) * 8
    assert glowplug.report(net).programs == 1, "explaining compiles nothing more"
    assert glowplug.explain_program(net) == glowplug.report(net).sources[-1]
    with pytest.raises(glowplug.UsageError, match="identity='hoisted'"):
        glowplug.explain(net, identity="baked")


def test_the_state_of_a_module_is_left_alone() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.net(x)

    model = Counts().eval()
    assert glowplug.explain(model, torch.ones(3, 8)).pieces
    assert model.calls == 0


def test_a_step_down_has_its_reason() -> None:
    class Scaled(Block):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    net = nn.Sequential(*(Scaled(float(number)) for number in range(8))).eval()
    net = glowplug.compile(net, compiler="eager")
    with torch.no_grad():
        net(torch.ones(3, 8))
    explained = glowplug.explain(net)
    (fallback,) = explained.fallbacks
    assert fallback.to == "hoisted"
    assert fallback.reason in str(explained)
    page = shown(explained)
    assert any(fallback.reason in words for words in page.words)
    assert any(fallback.reason in words for words in shown(glowplug.report(net)).words)


def test_wrong_input_is_refused() -> None:
    net = make_net()
    with pytest.raises(glowplug.UsageError, match="example arguments"):
        glowplug.explain(net)
    with pytest.raises(glowplug.UsageError, match=r"can't be run with these example arguments: \w+Error"):
        glowplug.explain(net, torch.ones(3, 5))
    with pytest.raises(glowplug.UsageError, match="not a int"):
        glowplug.explain(3)  # type: ignore[arg-type]


# -- in a notebook ------------------------------------------------


def test_a_block_for_each_step_of_each_layer() -> None:
    model = build("glm4_moe", layers=6)
    glowplug.compile(model, compiler="eager")
    with torch.no_grad():
        model(torch.arange(2, 8)[None])
    report = glowplug.report(model)
    assert report.strategy == "stamped"
    (program,) = read_programs(report.outlines).layers
    assert [row.layer for row in program] == list(range(6))
    names = [[block.name for block in row.blocks] for row in program]
    assert names[0] == ["A", "kv_cache_update", "attention", "B"]
    assert names[1] == ["kv_cache_update", "attention", names[1][-1]]
    page = shown(report)
    assert len(page.titles) == sum(len(row.blocks) for row in program)
    assert "piece B, layers 0-1" in page.titles
    assert "op attention, layer 0" in page.titles
    assert any(re.fullmatch(r"once, \d+ ops, layer 0", words) for words in page.words)
    assert "b" in page.words and "attention" in page.words, "the legend says what b stands for"
    assert any("serving: program" in words for words in page.words)


def test_a_report_before_the_first_call_has_no_blocks() -> None:
    page = shown(glowplug.report(glowplug.compile(make_net(), compiler="eager")))
    assert page.titles == []
    assert any("nothing yet" in words for words in page.words)


def test_what_comes_from_a_model_is_escaped() -> None:
    report = glowplug.Report(serving="eager: <img src=x onerror=alert(1)>", experts='"><script>')
    report.fall_back("it read 'a' < \"b\" & </div><script>alert(1)</script>", ("<b>layer</b>",), to="op")
    page = report_html(report)
    assert "<script" not in page
    assert "<img" not in page
    text = " ".join(Text(page).words)
    assert "</div><script>alert(1)</script> (<b>layer</b>)" in text
    assert shown(report).tags <= {"div", "span", "b"}


def test_a_step_down_names_few_of_many_layers() -> None:
    report = glowplug.Report()
    report.fall_back("too wide", tuple(f"layers.{number}" for number in range(92)), to="launches")
    assert "launched kernels one by one : too wide (layers.0, layers.1, layers.2, ...)" in " ".join(shown(report).words)


def test_no_text_has_a_colour_without_a_background() -> None:
    net = glowplug.compile(make_net(), compiler="eager")
    with torch.no_grad():
        net(torch.ones(3, 8))
    for style in re.findall(r'style="([^"]*)"', report_html(glowplug.report(net))):
        properties = {entry.split(":")[0] for entry in style.split(";") if entry}
        assert "color" not in properties or "background" in properties
    assert len({_colour(number) for number in range(100)}) == 100


def test_names_of_pieces() -> None:
    assert [letter(number) for number in (0, 25, 26, 27, 702)] == ["A", "Z", "AA", "AB", "AAA"]
