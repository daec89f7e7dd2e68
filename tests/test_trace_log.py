"""`TORCH_TRACE`: the structured trace has the program, the table of its steps and the graph of each distinct piece."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import torch, families, glowplug
model = glowplug.compile(families.build("gpt_oss"), compiler="eager")
with torch.no_grad():
    model(families.prompt(1, 4))
print(glowplug.report(model).pieces, glowplug.report(model).distinct_pieces)
"""


def artifacts(folder: Path) -> dict[str, list[str]]:
    """The payloads of the trace's artifacts, by name. A record is a line of JSON, its payload follows, indented."""
    found: dict[str, list[str]] = {}
    name = None
    for line in "".join(file.read_text() for file in folder.iterdir()).splitlines():
        if line.startswith("\t") and name is not None:
            found[name][-1] += line[1:] + "\n"
        elif line.startswith("V"):
            record = json.loads(line[line.index("{") :])
            name = record.get("artifact", {}).get("name") if record.get("has_payload") else None
            if name is not None:
                found.setdefault(name, []).append("")
    return found


def test_structured_trace(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=True)
    pieces, distinct = map(int, done.stdout.split())
    found = artifacts(tmp_path)
    table = json.loads(found["glowplug_pieces"][0])
    rows = [row for row in table if "piece" in row]
    assert len(rows) == pieces
    assert sum(row["compiled"] for row in rows) == distinct
    assert {row["op"] for row in table if "op" in row} == {"glowplug::kv_cache_update", "glowplug::attention"}
    for row in rows:
        (graph,) = found[f"glowplug_piece_{row['piece']}"]
        assert graph.startswith("%0 = input()") and "return(" in graph
    assert found["glowplug_program"][0].startswith("def run(")
