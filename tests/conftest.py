"""What every test relies on: one thread, seeded random numbers, quiet libraries, nothing fetched."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # where there are more, those that wait leave the cores to the rest
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GLOWPLUG_CACHE"] = "off"

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import fx

from glowplug.graph import capture as capture_room
from storing import stored_at

torch.set_num_threads(1)


# pytest listens to every logger that does not propagate. torch's structured trace, which is off while nobody listens,
# is one of them: it would write out each graph several times.
logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(autouse=True, scope="session")
def quiet_transformers() -> None:
    """transformers warns about generation settings on every call of the tests."""
    transformers_logging = pytest.importorskip("transformers").logging
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers, alone or in the suite."""
    torch.manual_seed(0)


@pytest.fixture
def glowplug_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The messages of glowplug's logger."""
    with caplog.at_level(logging.INFO, logger="glowplug"):
        yield caplog


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options by which the models of a module are traced once: for tests of what comes after."""
    return stored_at(tmp_path_factory.mktemp("store"))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.Graph]:
    """Every graph that is captured, as Dynamo handed it over."""
    seen: list[fx.Graph] = []
    describe = capture_room.describe

    def spy(gm: fx.GraphModule, *handle: type) -> Any:
        copied = fx.Graph()
        copied.graph_copy(gm.graph, {})
        seen.append(copied)
        return describe(gm, *handle)

    monkeypatch.setattr(capture_room, "describe", spy)
    monkeypatch.setattr("glowplug.backend.describe", spy)
    return seen


class CountingCompiler:
    """A piece compiler that runs pieces as they are, and counts what it was asked to do."""

    name = "counting"

    def __init__(self) -> None:
        self.compiled = 0
        self.ran = 0

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        """See `glowplug.compilers.PieceCompiler`."""
        self.compiled += 1

        def run(*args: Any) -> Sequence[Any]:
            self.ran += 1
            return piece.forward(*args)

        return run


@pytest.fixture
def counting() -> CountingCompiler:
    """A fresh `CountingCompiler`."""
    return CountingCompiler()
