"""The wheel and the source archive: what is in them, and that the package works from a wheel in any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

import glowplug
from glowplug.bench.models import find_folder
from glowplug.checkpoints import CHECKPOINTS, find_checkpoint
from glowplug.errors import UsageError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD = "import sys; from setuptools import build_meta as backend; getattr(backend, sys.argv[1])(sys.argv[2])"
LOAD = """
import sys
from pathlib import Path

import glowplug
from glowplug.bench.demo import PROMPT
from glowplug.bench.models import find_folder, load_model
from glowplug.checkpoints import CHECKPOINTS
from transformers import AutoTokenizer

wheel = Path(sys.argv[1])
assert wheel in Path(glowplug.__file__).parents, glowplug.__file__
for name in CHECKPOINTS:
    assert wheel in find_folder(name).parents
    assert load_model(name).dtype.is_floating_point
    assert AutoTokenizer.from_pretrained(find_folder(name))(PROMPT)["input_ids"]
"""


def build(kind: str, source: Path, out: Path) -> Path:
    """Build `"sdist"` or `"wheel"` of a source folder, as pip does, with the installed setuptools."""
    subprocess.run([sys.executable, "-c", BUILD, f"build_{kind}", out], cwd=source, check=True, capture_output=True)
    (archive,) = out.glob({"sdist": "*.tar.gz", "wheel": "*.whl"}[kind])
    return archive


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source archive of a copy of the repository."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("sdist")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    with tarfile.open(build("sdist", copy, out)) as archive:
        archive.extractall(out, filter="data")
    return out / f"glowplug-{glowplug.__version__}"


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel of the source archive."""
    out = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build("wheel", sdist, out)) as archive:
        archive.extractall(out / "unpacked")
    return out / "unpacked"


def files(folder: Path) -> set[str]:
    """The paths of all files in a package, without what Python and transformers add."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_both_hold_the_whole_package(sdist: Path, wheel: Path) -> None:
    expected = files(ROOT / "src" / "glowplug")
    assert expected >= {"py.typed", *(f"checkpoints/{name}/model.safetensors" for name in CHECKPOINTS)}
    assert files(wheel / "glowplug") == expected
    assert files(sdist / "src" / "glowplug") == expected
    assert not (sdist / "tests").exists()
    assert {path.name for path in wheel.iterdir()} == {"glowplug", f"glowplug-{glowplug.__version__}.dist-info"}


def test_the_metadata(wheel: Path) -> None:
    distribution = PathDistribution(wheel / f"glowplug-{glowplug.__version__}.dist-info")
    metadata = distribution.metadata
    assert metadata["Version"] == PROJECT["project"]["version"] == glowplug.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert not {"Home-page", "Project-URL", "Download-URL"} & set(metadata)
    points = {(point.group, point.name): point.value for point in distribution.entry_points}
    assert points[("console_scripts", "glowplug")] == "glowplug.cli:main"
    assert points[("torch_dynamo_backends", "glowplug")] == "glowplug.backend:glowplug_backend"
    assert points[("vllm.general_plugins", "glowplug")] == "glowplug.frontends.vllm.plugin:register"


def test_the_wheel_works_in_another_folder(wheel: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(wheel), "HF_HUB_OFFLINE": "1"}
    for arguments in (["-m", "glowplug", "demo", "--help"], ["-c", LOAD, wheel]):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_names_of_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is a checkpoint of the package unless a local folder has that name."""
    monkeypatch.chdir(tmp_path)
    for name in CHECKPOINTS:
        assert find_folder(name) == find_checkpoint(name)
    (tmp_path / CHECKPOINTS[0]).mkdir()
    (tmp_path / CHECKPOINTS[0] / "config.json").write_text("{}")
    assert find_folder(CHECKPOINTS[0]) == Path(CHECKPOINTS[0])
    with pytest.raises(UsageError, match="tiny-gpt-oss and tiny-ernie-vl"):
        find_checkpoint("../bench")
    with pytest.raises(UsageError, match="checkpoints: tiny-gpt-oss, tiny-ernie-vl"):
        find_folder("no-such-model")
