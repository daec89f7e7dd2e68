"""`glowplug starts --fleet`: processes on one store compile each piece once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from test_cli import run


@pytest.mark.inductor
def test_a_fleet(tmp_path: Path) -> None:
    written = tmp_path / "starts.json"
    arguments = ("qwen3-30b-a3b", "--depth", "5", "--experts", "opaque", "--ways", "cold", "--fleet", "2")
    result = run("starts", *arguments, "--rounds", "1", "--json", str(written))
    assert result.exit_code == 0, result.output
    told = json.loads(written.read_text())
    assert len(told["fleets"]) == 2
    for fleet in told["fleets"].values():
        reports = [process["report"] for process in fleet]
        assert sum(report["compiled_pieces"] for report in reports) == reports[0]["distinct_pieces"] > 0
