"""Whether Inductor can compile here, and what runs uncompiled."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from glowplug.api import compile as compile_model
from glowplug.cli.doctor.finding import Finding
from glowplug.compilers import InductorCompiler
from glowplug.reasons import switched_off, why

_CXX_ADVICE = "see that the C++ compiler works: echo 'int main(){}' | ${CXX:-g++} -x c++ -"


class Probe(nn.Module):
    """A small module with a new constant each time, so that no cache of compiled code answers for the compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.constant = random.Random().randrange(2**24)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (tokens, 8) -> (tokens, 8)."""
        return torch.relu(self.linear(x)) + self.constant


def device_types() -> tuple[str, ...]:
    """The types of device on which models may run here."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def why_not(device_type: str, *, trial: bool) -> tuple[str | None, float]:
    """Why nothing can be compiled for a device, or None; and the seconds that a trial took.

    Args:
        device_type: `"cpu"` or `"cuda"`.
        trial: whether to compile and run a small module.
    """
    reason = switched_off() or InductorCompiler().problem(device_type)
    if reason is not None or not trial:
        return reason, 0.0
    start = time.perf_counter()
    try:
        probe = Probe().eval().requires_grad_(False).to(device_type)
        x = torch.ones(4, 8, device=device_type)
        with torch.no_grad():
            expected = probe(x)
            compiled = compile_model(probe, strict=True, cache_dir="off", ends="compiled")
            wrong = not torch.allclose(compiled(x), expected)
        reason = "compiled code gives another result than eager" if wrong else None
    except Exception as exc:  # whatever keeps it from compiling is the finding
        reason = why(exc)
    return reason, time.perf_counter() - start


def compilers(reasons: Mapping[str, tuple[str | None, float]]) -> Iterator[Finding]:
    """The state of the compiler, from what `why_not` said of each device."""
    for device_type, (reason, seconds) in reasons.items():
        name = f"inductor on {device_type}"
        if reason is not None:
            known = switched_off() or InductorCompiler().problem(device_type)  # these say what to do by themselves
            advice = _CXX_ADVICE if known is None and device_type == "cpu" else ""
            yield Finding("compiler", name, reason, "problem", advice)
        elif seconds:
            yield Finding("compiler", name, f"compiled and ran a small module in {seconds:.1f} s")
        else:
            yield Finding("compiler", name, "no obstacle is known; nothing was compiled", "note")
    if InductorCompiler().forks([]):
        yield Finding("compiler", "processes", "pieces for a CPU compile in forks, deferred pieces beside serving")
    else:
        text = "pieces compile in this process: CUDA is initialised, or Inductor may compile in one thread only"
        yield Finding("compiler", "processes", text, "note")


def eager(reasons: Mapping[str, tuple[str | None, float]], *, linux: bool) -> Iterator[Finding]:
    """What would run eager here, and why."""
    for device_type, (reason, _) in reasons.items():
        name = f"models on {device_type}"
        if reason is not None:
            yield Finding("eager", name, f"all calls: {reason}", "note")
        elif device_type == "cpu" and linux:
            text = "no call; op bodies and pieces that seldom run start uncompiled, until they have been compiled"
            yield Finding("eager", name, text)
        else:
            text = "no call; the bodies of opaque ops (experts, attention of several kernels) run uncompiled"
            yield Finding("eager", name, text, "ok", 'compile(model, inside="compiled") compiles them')
    text = "calls that need gradients, and what can't be traced or proved equal; glowplug.report(model) says why"
    yield Finding("eager", "anywhere", text)
