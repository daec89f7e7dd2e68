"""Starts of vLLM in processes of their own, and what vLLM does without the plug-in."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import tiny

_TIMEOUT_S = 300


@dataclass(frozen=True)
class Outcome:
    """What a start of vLLM gave; see `worker.start`."""

    tokens: list[list[int]]
    after: list[list[list[int]]]
    notes: list[Any]
    lines: list[str]
    lines_after: list[list[str]]
    ready_s: float
    generate_s: float
    graphs: int
    patched: bool
    prepared: bool
    log: Path

    @property
    def distinct(self) -> int:
        """The number of distinct tokens."""
        return len({token for row in self.tokens for token in row})

    def says(self, text: str) -> bool:
        """Whether a line of the plug-in has a text."""
        return any(text in line for line in self.lines)


class Worker:
    """A process that has imported vLLM and forks for every start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.starts = 0
        self._process: subprocess.Popen[str] | None = None

    def start(self, model: Path, cache: Path, **job: Any) -> Outcome:
        """Start vLLM; for the arguments see `worker`."""
        self.starts += 1
        log = self.folder / f"{self.starts}.log"
        shared = self.folder / "modelinfos"  # what vLLM finds out about a model's class, in a process of its own
        shared.mkdir(exist_ok=True)
        (cache / "vllm").mkdir(parents=True, exist_ok=True)
        if not (cache / "vllm" / "modelinfos").exists():
            (cache / "vllm" / "modelinfos").symlink_to(shared)
        answer = self._ask({"model": str(model), "cache": str(cache), "log": str(log), **job})
        if "error" in answer:
            pytest.fail(f"{answer['error']}\n{log.read_text()[-6000:]}")
        return Outcome(**answer, log=log)

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS",)}
            worker = Path(__file__).with_name("worker.py")
            self._process = subprocess.Popen(
                [sys.executable, worker],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=(self.folder / "worker.log").open("w"),
                text=True,
                start_new_session=True,
            )
            self._answer()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], _TIMEOUT_S)[0]:
            self.stop()
            return {"error": f"no answer within {_TIMEOUT_S} s"}
        line = self._process.stdout.readline()
        if not line:
            self.stop()
            return {"error": (self.folder / "worker.log").read_text()[-2000:]}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        """End the process and its forks."""
        if self._process is not None:
            for child in _children(self._process.pid):
                _kill(child)
            _kill(self._process.pid)
            self._process.wait()
            self._process = None


def store(cache: Path) -> Path:
    """The plug-in's store in a cache folder."""
    return cache / "vllm" / "torch_compile_cache" / "glowplug"


def _children(pid: int) -> list[int]:
    file = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in file.read_text().split()] if file.exists() else []


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


@dataclass
class Bench:
    """Models, starts of vLLM, and references that are computed once.

    Attributes:
        folder: for models and references.
        worker: starts vLLM.
    """

    folder: Path
    worker: Worker
    references: dict[Any, Outcome] = field(default_factory=dict)
    colds: dict[Path, tuple[Outcome, Path]] = field(default_factory=dict)

    def model(self, family: str, **options: Any) -> Path:
        """The folder of a model, which no test changes."""
        name = "-".join([family, *(f"{key}-{value}" for key, value in options.items())])
        folder = self.folder / "models" / re.sub(r"[^\w-]+", "_", name)  # vLLM takes it for a pattern
        if not folder.exists():
            tiny.build(family, folder, **options)
        return folder

    def cold(self, model: Path) -> tuple[Outcome, Path]:
        """The first start with the plug-in, and its cache folder, which no test changes."""
        if model not in self.colds:
            cache = self.folder / "colds" / model.name
            self.colds[model] = self.start(model, cache), cache
        return self.colds[model]

    def warm(self, model: Path, into: Path, *, records: bool = True) -> Path:
        """A copy of the cache folder after the first start; without `records`, a start from it traces, but compiles
        little."""
        shutil.copytree(self.cold(model)[1], into, symlinks=True)
        if not records:
            shutil.rmtree(store(into) / "manifests")
            shutil.rmtree(store(into) / "pieces")
        return into

    def changed(self, model: Path, into: Path, **options: Any) -> Path:
        """A copy of a model with another configuration."""
        shutil.copytree(model, into)
        tiny.change(into, **options)
        return into

    def start(self, model: Path, cache: Path, **job: Any) -> Outcome:
        """Start vLLM with the plug-in."""
        return self.worker.start(model, cache, **job)

    def reference(self, model: Path, *, eager: bool = True, **job: Any) -> Outcome:
        """What vLLM does without the plug-in: uncompiled, or compiled by vLLM."""
        key = json.dumps([str(model), eager, job], sort_keys=True)
        if key not in self.references:
            engine = job.pop("engine", {}) | ({"enforce_eager": True} if eager else {})
            environment = job.pop("environment", {}) | {"GLOWPLUG_VLLM": "0"}
            cache = self.folder / "caches" / str(len(self.references))
            self.references[key] = self.worker.start(model, cache, engine=engine, environment=environment, **job)
        return self.references[key]


@pytest.fixture(scope="session")
def vllms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """See `Bench`."""
    pytest.importorskip("vllm.envs")
    folder = tmp_path_factory.mktemp("vllm")
    worker = Worker(folder)
    yield Bench(folder, worker)
    worker.stop()
