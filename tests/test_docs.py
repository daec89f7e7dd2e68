"""The documentation: links lead somewhere, pages open with the question that they answer, commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from glowplug.cli.application import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("models/**/*.md"), *ROOT.glob("src/**/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_a_page_opens_with_its_question(page: Path) -> None:
    first = page.read_text().splitlines()[0]
    assert first.startswith("# ") and first.endswith("?")
    assert f"docs/{page.name}" in (ROOT / "README.md").read_text()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"^glowplug ([a-z]+)|`glowplug ([a-z]+)[ `]", page.read_text(), re.MULTILINE))
    assert {first or second for first, second in named} <= commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_records_exist(page: Path) -> None:
    for record in re.findall(r"`(benchmarks/[\w./-]+)`", page.read_text()):
        assert (ROOT / record).exists(), record
