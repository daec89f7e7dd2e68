"""Several processes: replicas that compile a piece once, and models that tensor parallelism has distributed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from glowplug.bench.presets import build_model

WORKER = Path(__file__).with_name("ranks.py")
LIMIT_S = 120


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two saved models."""
    folder = tmp_path_factory.mktemp("ranks", numbered=True)
    for name, preset in (("glm", "glm-4.7"), ("gpt", "gpt-oss-120b")):
        build_model(preset, depth=8).save_pretrained(folder / name)
    return folder


def run_ranks(scenario: str, folder: Path, ranks: int = 2) -> list[dict[str, Any]]:
    """Run a scenario of `ranks.py` in several processes; what each found. Never takes longer than `LIMIT_S`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    env |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(ranks)}
    processes, files = [], []
    for rank in range(ranks):
        files.append((folder / f"rank-{rank}.txt").open("w+"))
        processes.append(
            subprocess.Popen(
                [sys.executable, str(WORKER), scenario, str(folder)],
                env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=files[-1],
                stderr=subprocess.STDOUT,
            )
        )
    end = time.monotonic() + LIMIT_S
    try:
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            assert time.monotonic() < end, f"{scenario} takes too long"
            time.sleep(0.05)
    finally:
        codes = [process.poll() for process in processes]
        for process in processes:
            process.kill()
            process.wait()
    said = []
    for file in files:
        file.seek(0)
        said.append(file.read()[-3000:])
        file.close()
    assert codes == [0] * ranks, "\n\n".join(said)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def parallel(models: Path) -> list[dict[str, Any]]:
    """What two ranks of tensor parallel models found."""
    return run_ranks("parallel", models)


@pytest.mark.parametrize("name", ["glm auto", "glm opaque", "gpt auto"])
def test_tensor_parallel_models_are_stamped_and_right(parallel: list[dict[str, Any]], name: str) -> None:
    for rank in parallel:
        got = rank[name]
        assert got["strategy"] == "stamped" and not got["reasons"]
        assert got["error"] <= 1e-5
        assert got["tokens"] == got["expected"]


def test_the_forwards_of_tensor_parallelism_are_put_back(parallel: list[dict[str, Any]]) -> None:
    for rank in parallel:
        assert rank["glm auto"]["forwards"][0] > 50 and rank["glm auto"]["forwards"][1]
        assert rank["glm auto"]["experts"] == "opaque"


@pytest.mark.parametrize(("name", "reason"), [("disagree", "it is a test"), ("alone", "no program here")])
def test_when_one_rank_can_not_serve_all_run_eager(parallel: list[dict[str, Any]], name: str, reason: str) -> None:
    for rank in parallel:
        got = rank[name]
        assert got["strategy"] == "eager"
        assert "process 1" in got["reasons"][0] and reason in got["reasons"][0]
        assert got["error"] <= 1e-5 and got["tokens"] == got["expected"]


def _check_compiled_once(ranks: list[dict[str, Any]]) -> None:
    stored = [rank["counts"].get("piece stored", 0) for rank in ranks]
    distinct = {rank["distinct"] for rank in ranks}
    seen = [(rank["start"], rank["counts"], rank["problems"]) for rank in ranks]
    assert len(distinct) == 1 and sum(stored) == distinct.pop()
    assert sorted(rank["start"] for rank in ranks) == ["cold", *["warm"] * (len(ranks) - 1)], seen


@pytest.mark.inductor
def test_tensor_parallel_ranks_compile_each_piece_once(models: Path) -> None:
    ranks = run_ranks("stored", models)
    _check_compiled_once([rank["cold"] for rank in ranks])
    for rank in ranks:
        assert rank["background"]["elsewhere"] == "the model is distributed over processes"
        for start in ("cold", "warm", "background"):
            got = rank[start]
            assert got["strategy"] == "stamped" and not got["reasons"] and not got["problems"]
            assert got["error"] <= 1e-5 and got["tokens"] == got["expected"]
        assert rank["warm"]["start"] == "warm" and "piece stored" not in rank["warm"]["counts"]


@pytest.mark.inductor
def test_replicas_compile_each_piece_once(models: Path) -> None:
    ranks = run_ranks("replicas", models)
    _check_compiled_once([rank["replica"] for rank in ranks])
    for rank in ranks:
        got = rank["replica"]
        assert got["strategy"] == "stamped" and not got["problems"]
        assert got["error"] <= 1e-4 and got["tokens"] == got["expected"]
