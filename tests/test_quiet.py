"""No warning or log line of another library reaches a user through glowplug, and glowplug's own lines are one each."""

from __future__ import annotations

import ast
import functools
import logging
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import glowplug
from glowplug.bench.presets import build_model
from glowplug.runtime.quiet import RETRACED, quiet, quiet_log
from test_cli import PROMPT, make_tokenizer

ERRORS = [f"-Werror::{category}" for category in ("DeprecationWarning", "FutureWarning", "UserWarning")]
PROGRAM = """
import sys
import torch
import transformers
import glowplug

transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
folder, compiler = sys.argv[1:]
prompt = torch.arange(2, 12)[None]


def serve(model):
    for _ in range(2):
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
        glowplug.settle(model)
    report = glowplug.report(model)
    assert (report.serving, report.fallbacks) == ("program", []), report
    return report.start


load = transformers.AutoModelForCausalLM.from_pretrained
starts = [serve(glowplug.compile(load(folder), compiler=compiler)) for _ in range(2)]
if compiler == "inductor":
    starts.append(serve(glowplug.from_pretrained(folder)))
net = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()) for _ in range(8))).eval()
with torch.no_grad():
    glowplug.compile(net, compiler=compiler)(torch.ones(3, 8))
    torch.compile(net[0], backend="glowplug", options={"compiler": compiler})(torch.ones(3, 8))
glowplug.explain(load(folder))
print(starts)
"""


def run(command: list[str], store: Path) -> str:
    """What a Python process that takes warnings for errors writes to stdout. It must write nothing to stderr."""
    environment = {**os.environ, "GLOWPLUG_CACHE": str(store)}
    done = subprocess.run(
        [sys.executable, *ERRORS, *command], capture_output=True, text=True, check=False, env=environment, timeout=500
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved gpt-oss of twelve layers, which are stamped, with a tokenizer."""
    path = tmp_path_factory.mktemp("saved") / "model"
    build_model("gpt-oss-20b", depth=12).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_compile_and_generate(compiler: str, folder: Path, tmp_path: Path) -> None:
    starts = run(["-c", PROGRAM, str(folder), compiler], tmp_path / "store")
    assert starts.strip() == str(["cold", "cold"] if compiler == "eager" else ["cold", "warm", "warm"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "gpt-oss-120b", "--depth", "6"],
        ["generate", "FOLDER", "--prompt", PROMPT, "--max-new-tokens", "4", "--compiler", "eager"],
        ["doctor", "--no-trial"],
        pytest.param(["bake", "FOLDER", "--out", "STORE"], marks=pytest.mark.inductor),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands(arguments: list[str], folder: Path, tmp_path: Path) -> None:
    places = {"FOLDER": str(folder), "STORE": str(tmp_path / "baked")}
    assert run(["-m", "glowplug", *(places.get(argument, argument) for argument in arguments)], tmp_path / "store")


def test_only_what_is_known_is_ignored() -> None:
    with pytest.raises(DeprecationWarning, match="something else"), warnings.catch_warnings():
        warnings.simplefilter("error")
        with quiet():
            warnings.warn("`torch.jit.script_method` is deprecated. Please switch.", DeprecationWarning)
            warnings.warn("something else", DeprecationWarning)


class Cached(nn.Module):
    """Calls a cached function, and breaks the graph."""

    def forward(self, x: Tensor) -> Tensor:
        print(end="")
        return x * double(3)


class Item(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sum().item()


class Retraced(nn.Module):
    number = 0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.number


@functools.lru_cache
def double(number: int) -> int:
    return 2 * number


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Cached(), "calls print"),
        (Item(), "asks for the values of a tensor"),
        (Retraced(), "traced the module 8 times, each time for other arguments or attributes"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_dynamo_says_of_a_module_is_a_reason(
    module: nn.Module, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    glowplug.compile(module.eval(), compiler="eager")
    with torch.no_grad():
        for number in range(12):
            if isinstance(module, Retraced):
                module.number = number
            module(torch.ones(4, 8))
    (reason,) = (fallback.reason for fallback in glowplug.report(module).fallbacks)
    assert words in reason
    (line,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert line.startswith("glowplug: ") and reason in line


def test_lines_of_other_threads_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("torch._dynamo.convert_frame")
    say = functools.partial(logger.warning, f"{RETRACED}%s", "recompile_limit")
    with quiet_log() as dropped:
        say()
        logger.warning("something else")
        other = threading.Thread(target=say)
        other.start()
        other.join()
    assert dropped == [f"{RETRACED}%s"]
    say()
    assert caplog.messages == ["something else", *[f"{RETRACED}recompile_limit"] * 2]


def test_every_line_of_the_log_begins_with_the_name() -> None:
    seen = 0
    for file in Path(glowplug.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Call(ast.Attribute(owner, "debug" | "info" | "warning" | "error" | "log"), [*arguments]):
                    if "logger" in ast.unparse(owner):
                        text = next(a.value for a in arguments if isinstance(a, ast.Constant))
                        assert text.startswith("glowplug: "), f"{file}:{node.lineno}"
                        assert "\n" not in text
                        seen += 1
                case ast.Call(ast.Attribute(owner, "exception"), _) if "logger" in ast.unparse(owner):
                    raise AssertionError(f"{file}:{node.lineno} logs a traceback")
    assert seen > 5
