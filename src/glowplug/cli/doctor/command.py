"""`glowplug doctor`: says what glowplug finds on this machine, and what keeps it from compiling."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from glowplug.cli.doctor.examination import examine
from glowplug.cli.doctor.finding import Finding

_MARKS = {"ok": " ", "note": "-", "warning": "!", "problem": "X"}
_WIDTH = 16


def doctor(
    trial: Annotated[
        bool, typer.Option("--trial/--no-trial", help="Compile and run a small module, which takes some seconds.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Examine this machine: versions, devices, compiler, store, vLLM. Exit code 1 if something prevents compiling."""
    found = examine(trial=trial)
    problems = [finding for finding in found if finding.state == "problem"]
    if as_json:
        print(json.dumps({"ok": not problems, "findings": [asdict(finding) for finding in found]}, indent=2))
    else:
        print("\n".join(_lines(found)))
    if problems:
        raise typer.Exit(1)


def _lines(found: Sequence[Finding]) -> list[str]:
    lines, section = [], ""
    for finding in found:
        if finding.section != section:
            section = finding.section
            lines.append(section)
        lines.append(f" {_MARKS[finding.state]} {finding.name:<{_WIDTH}} {' '.join(finding.text.split())}")
        if finding.advice:
            lines.append(f"   {'':<{_WIDTH}} -> {finding.advice}")
    problems = sum(finding.state == "problem" for finding in found)
    warnings = sum(finding.state == "warning" for finding in found)
    lines.append("")
    if problems:
        lines.append(f"glowplug can't compile everything here: {problems} problem{'s' * (problems > 1)}, marked X")
    elif warnings:
        lines.append(f"glowplug compiles here; {warnings} warning{'s' * (warnings > 1)}, marked !")
    else:
        lines.append("all is well: glowplug compiles here")
    return lines
