"""Why something runs eager is one sentence that a person understands: nothing of what torch tells its developers."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

import glowplug
from families import build, prompt

FORBIDDEN = (
    r"Developer debug context",
    r"Explanation:",
    r"Hint:",
    r"from user code",
    r"Unsupported ",
    r"Variable\(",
    r"\w+Variable\b",
    r"0x[0-9a-f]{4,}",
    r"<[^<>]* at ",
    r"<(built-in|function|bound|class|module)",
    r"site-packages",
    r"/torch/",
    r"FakeTensor",
    r"L\['|G\['",
    r"TORCHDYNAMO_VERBOSE|TORCH_LOGS",
    r"Traceback",
    r"\n",
    r"''|\"\"|``",
    r"[:;,(] *$",
    r":  |: :",
)


def check(reasons: list[str]) -> None:
    for reason in reasons:
        assert reason
        found = [fragment for fragment in FORBIDDEN if re.search(fragment, reason)]
        assert not found, f"{found} in {reason!r}"


def reasons_of(model: nn.Module) -> list[str]:
    return [fallback.reason for fallback in glowplug.report(model).fallbacks]


# -- what can't be traced -------------------------------------------------------------------------------------------


@torch.compiler.disable
def left_alone(x: Tensor) -> Tensor:
    return x + 1


class Suppressing:
    def __enter__(self) -> None:
        raise RuntimeError("no")

    def __exit__(self, *_: Any) -> bool:
        return True


class Silent(Exception):
    pass


GRU = nn.GRU(8, 8).eval().requires_grad_(False)


def branches(x: Tensor) -> Tensor:
    return x + 1 if x.sum() > 0 else x - 1


def lists(x: Tensor) -> Tensor:
    return x + sum(x.flatten().tolist())


def finds(x: Tensor) -> Tensor:
    return x + x.nonzero().sum()


def breaks(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x + 1


def prints(x: Tensor) -> Tensor:
    print(end=" ")
    return x + 1


def collects(x: Tensor) -> Tensor:
    gc.collect(0)
    return x + 1


def asks_the_thread(x: Tensor) -> Tensor:
    return x + 0 * threading.get_ident()


def asks_the_time(x: Tensor) -> Tensor:
    return x + 0 * time.time()


def shows(x: Tensor) -> Tensor:
    return x + 0 * len(repr(object()))


def enters(x: Tensor) -> Tensor:
    with contextlib.suppress(RuntimeError), Suppressing():
        x = x + 1
    return x


def is_sparse(x: Tensor) -> Tensor:
    return x.to_sparse().to_dense() + 1


def looks_at_memory(x: Tensor) -> Tensor:
    return x + 0 * x.data_ptr()


def looks_up(x: Tensor) -> Tensor:
    try:
        return x + {}[object()]
    except KeyError:
        return x + 1


def draws(x: Tensor) -> Tensor:
    return x + torch.rand(8, generator=torch.Generator().manual_seed(0))


def remembers(x: Tensor) -> Tensor:
    return GRU(x)[0]


def opens(x: Tensor) -> Tensor:
    with open(os.devnull) as file:
        return x + len(file.read())


def raises_nothing_to_say(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        raise Silent
    return x + 1


def raises_in_words(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        raise KeyError("")
    return x + 1


UNTRACEABLE: dict[str, Callable[[Tensor], Tensor]] = {
    step.__name__: step
    for step in (
        branches,
        lists,
        finds,
        left_alone,
        breaks,
        prints,
        collects,
        asks_the_thread,
        asks_the_time,
        shows,
        enters,
        is_sparse,
        looks_at_memory,
        looks_up,
        draws,
        remembers,
        opens,
        raises_nothing_to_say,
        raises_in_words,
    )
}
PLACED = ("branches", "lists", "prints", "collects", "shows", "looks_at_memory", "opens", "asks_the_time")
"""Those whose reasons must name a line of this file."""


class Step(nn.Module):
    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self.linear(x))


class Steps(nn.Module):
    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Step(step) for _ in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def steps(step: Callable[[Tensor], Tensor]) -> nn.Module:
    return Steps(step).eval().requires_grad_(False)


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_a_plain_module(name: str) -> None:
    torch._dynamo.reset()
    model = steps(UNTRACEABLE[name])
    x = torch.randn(4, 8)
    expected = copy.deepcopy(model)(x)
    glowplug.compile(model, compiler="eager")
    with torch.no_grad():
        try:
            actual = model(x)
        except (Silent, KeyError):  # the model's own, which asks whether it is compiled
            actual = expected
    torch.testing.assert_close(actual, expected)
    reasons = reasons_of(model)
    assert reasons
    check(reasons)
    if name in PLACED:
        assert any(re.search(r"test_reasons\.py:\d+", reason) for reason in reasons), reasons


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_a_language_model(name: str) -> None:
    torch._dynamo.reset()
    model = build("qwen3", layers=2)
    model.model.norm = nn.Sequential(model.model.norm, Untraceable(UNTRACEABLE[name]))
    own = copy.deepcopy(model)
    glowplug.compile(model, compiler="eager")
    with torch.no_grad():
        torch.testing.assert_close(model(prompt(1, 5)).logits, own(prompt(1, 5)).logits)
    reasons = reasons_of(model)
    assert reasons or glowplug.report(model).programs == 1
    check(reasons)
    if name in PLACED:
        assert any(re.search(r"test_reasons\.py:\d+", reason) for reason in reasons), reasons


class Untraceable(nn.Module):
    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        kept = self.step(x[..., :8])
        return torch.cat([kept, x[..., 8:]], dim=-1)


class Failing:
    """A piece compiler that fails in many words."""

    name = "failing"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def compile(self, piece: Any, inputs: Any) -> Any:
        raise self.error


ERRORS = {
    "an object": RuntimeError(f"can't lower {object()} of {torch.relu}\n\nSet TORCHDYNAMO_VERBOSE=1 for more"),
    "nothing": RuntimeError(),
    "a trace": ValueError('\n\nTraceback\n  File "/usr/lib/torch/x.py", line 3, in f\nno such kernel\n'),
    "a full disk": OSError(28, "No space left on device", "/tmp/x"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_compiler_that_fails(name: str) -> None:
    for model, inputs in ((build("qwen3", layers=2), prompt(1, 5)), (steps(torch.relu), torch.randn(4, 8))):
        own = copy.deepcopy(model)
        glowplug.compile(model, compiler=Failing(ERRORS[name]))
        with torch.no_grad():
            actual, expected = model(inputs), own(inputs)
        assert torch.equal(getattr(actual, "logits", actual), getattr(expected, "logits", expected))
        reasons = reasons_of(model)
        assert reasons
        check(reasons)


# -- what is known before anything is traced ------------------------------------------------------------------------


def both() -> list[tuple[nn.Module, Tensor]]:
    return [(build("qwen3", layers=2), prompt(1, 5)), (steps(torch.relu), torch.randn(4, 8))]


def runs_eager(model: nn.Module, inputs: Tensor, words: str, **options: Any) -> None:
    """The model answers as it would by itself, and the one reason has the words in it."""
    own = copy.deepcopy(model)
    if "forward" not in model.__dict__ or "compiler" in options:
        glowplug.compile(model, **options)
    with torch.no_grad():
        actual, expected = model(inputs), own(inputs)
    assert torch.equal(getattr(actual, "logits", actual), getattr(expected, "logits", expected))
    (reason,) = reasons_of(model)
    assert words in reason
    check([reason])
    assert not any(glowplug.report(model).phases[phase] for phase in ("trace", "compile"))
    glowplug.compile(own, strict=True, **options)
    with pytest.raises(glowplug.GlowplugError, match=re.escape(words)), torch.no_grad():
        own(inputs)


@pytest.mark.parametrize("switch", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_a_switch_that_turns_compiling_off(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for model, inputs in both():
        with monkeypatch.context() as patch:
            patch.setenv(switch, "1")
            runs_eager(model, inputs, f"{switch}=1", compiler="eager")
        with torch.no_grad():
            model(inputs)
        assert glowplug.report(model).programs == 1  # once it is unset, the model is compiled


@pytest.mark.parametrize("switch", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_a_process_that_starts_with_the_switch(switch: str) -> None:
    program = """
        import torch, glowplug, families, copy
        for model, inputs in ((families.build("qwen3", layers=2), families.prompt(1, 5)),
                              (torch.nn.Sequential(torch.nn.Linear(4, 4)).eval(), torch.randn(2, 4))):
            own = copy.deepcopy(model)
            glowplug.compile(model, compiler="eager")
            with torch.no_grad():
                actual, expected = model(inputs), own(inputs)
            assert torch.equal(getattr(actual, "logits", actual), getattr(expected, "logits", expected))
            print(*[fallback.reason for fallback in glowplug.report(model).fallbacks])
    """
    environment = {**os.environ, switch: "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"{switch}=1 is set") for line in lines)


def test_a_stance_that_turns_compiling_off() -> None:
    for model, inputs in both():
        with torch.compiler.set_stance("force_eager"):
            runs_eager(model, inputs, "force_eager", compiler="eager")


@pytest.mark.parametrize("stance", ["eager_on_recompile", "fail_on_recompile", "eager_then_compile"])
def test_other_stances_leave_the_model_to_its_program(stance: str) -> None:
    model = build("qwen3", layers=6)
    own = copy.deepcopy(model)
    glowplug.compile(model, compiler="eager")
    with torch.compiler.set_stance(stance), torch.no_grad():
        torch.testing.assert_close(model(prompt(1, 5)).logits, own(prompt(1, 5)).logits)
    assert glowplug.report(model).strategy == "stamped"
    assert reasons_of(model) == []


def test_no_cpp_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "/no/such/compiler")}):
        for model, inputs in both():
            runs_eager(model, inputs, "there is no C++ compiler", compiler="inductor")


@pytest.mark.parametrize("how", ["a space", "no folder"])
def test_a_folder_that_inductor_can_not_use(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / ("with a space" if how == "a space" else "file/folder")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    for model, inputs in both():
        runs_eager(model, inputs, "set TORCHINDUCTOR_CACHE_DIR or TMPDIR to another", compiler="inductor")
        assert str(folder) in reasons_of(model)[0]


def test_offloaded_weights(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    for offload in (
        lambda model: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
        lambda model: accelerate.disk_offload(model, tmp_path / type(model).__name__, torch.device("cpu")),
    ):
        for model, inputs in both():
            expected = model(inputs)
            offload(model)
            glowplug.compile(model, compiler="eager")
            with torch.no_grad():
                actual = model(inputs)
            assert torch.equal(getattr(actual, "logits", actual), getattr(expected, "logits", expected))
            (reason,) = reasons_of(model)
            assert "accelerate" in reason
            assert "load the model onto one device" in reason


@pytest.mark.filterwarnings("ignore")
def test_quantize_dynamic() -> None:
    for model, inputs in both():
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        runs_eager(quantized, inputs, "torch.ao.quantization", compiler="eager")


def test_weights_without_values() -> None:
    model = build("qwen3", layers=2).to("meta")
    glowplug.compile(model, compiler="eager")
    with contextlib.suppress(RuntimeError, NotImplementedError), torch.no_grad():
        model(prompt(1, 5).to("meta"))
    (reason,) = reasons_of(model)
    assert "meta device" in reason


def test_gradient_checkpointing_is_no_reason() -> None:
    model = build("qwen3", layers=6)
    model.gradient_checkpointing_enable()
    own = copy.deepcopy(model)
    glowplug.compile(model, compiler="eager")
    with torch.no_grad():
        torch.testing.assert_close(model(prompt(1, 5)).logits, own(prompt(1, 5)).logits)
    if Version(torch.__version__) < Version("2.12"):  # which can't trace the hook that asks for gradients
        assert len(reasons_of(model)) == 1 and "computes gradients" in reasons_of(model)[0]
    else:
        assert (glowplug.report(model).strategy, reasons_of(model)) == ("stamped", [])
