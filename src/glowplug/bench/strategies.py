"""The strategies to compare: eager, torch.compile in four ways, and glowplug's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import glowplug
from glowplug.bench.spec import Spec
from glowplug.errors import UsageError


@dataclass(frozen=True)
class Strategy:
    """One way to start a model.

    Attributes:
        name: its name in tables.
        compiles_by: `""`, `"torch"` or `"glowplug"`.
        apply: changes the model in place so that it compiles at its next calls.
        auto_compile: whether `generate` compiles the steps over a static cache by itself, as transformers does on GPUs.
    """

    name: str
    compiles_by: str
    apply: Callable[[nn.Module, Spec], None]
    auto_compile: bool = False


def layer_stack(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a model's text part: its longest `nn.ModuleList` that lies in no other one.

    Raises:
        UsageError: the model has no list of modules.
    """
    find: Any = getattr(model, "get_decoder", None)
    decoder: nn.Module = find() if find is not None else model
    lists = {name: m for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise UsageError(f"{type(model).__name__} has no list of layers")
    return max(outer, key=len)


def _eager(model: nn.Module, spec: Spec) -> None:
    """Run as it is."""


def _torch_full(model: nn.Module, spec: Spec) -> None:
    """Compile the whole model as one function, default settings."""
    model.compile()


def _torch_regional(model: nn.Module, spec: Spec) -> None:
    """Compile each layer by itself: torch's regional compilation."""
    for layer in layer_stack(model):
        layer.compile()


def _torch_nested(model: nn.Module, spec: Spec) -> None:
    """Compile the whole model, with its layers' forward marked as a region to be compiled once."""
    for cls in {type(layer) for layer in layer_stack(model)}:
        region: Any = torch.compiler.nested_compile_region(cls.forward)
        cls.forward = region  # this process measures one strategy, and ends
    model.compile()


def _glowplug(identity: str) -> Strategy:
    """glowplug with a full trace."""

    def apply(model: nn.Module, spec: Spec) -> None:
        glowplug.compile(model, identity=identity, experts=spec.experts, compiler=spec.compiler, stamp="off")

    return Strategy(identity, "glowplug", apply)


def _stamped(model: nn.Module, spec: Spec) -> None:
    """glowplug with a stamped template; on a GPU decode steps are replayed as CUDA graphs."""
    glowplug.compile(model, experts=spec.experts, compiler=spec.compiler, cuda_graphs="auto")


def _stamped_launches(model: nn.Module, spec: Spec) -> None:
    """Stamped, with each kernel launched from Python."""
    glowplug.compile(model, experts=spec.experts, compiler=spec.compiler, cuda_graphs="off")


def _stamped_whole(model: nn.Module, spec: Spec) -> None:
    """Stamped, with every piece compiled before the first answer."""
    glowplug.compile(model, experts=spec.experts, compiler=spec.compiler, ends="compiled")


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("eager", "", _eager),
        Strategy("torch-full", "torch", _torch_full),
        Strategy("torch-regional", "torch", _torch_regional),
        Strategy("torch-nested", "torch", _torch_nested),
        _glowplug("baked"),
        _glowplug("ordered"),
        _glowplug("hoisted"),
        Strategy("stamped", "glowplug", _stamped),
        Strategy("stamped-whole", "glowplug", _stamped_whole),
        Strategy("stamped-launches", "glowplug", _stamped_launches),
        Strategy("torch-static", "torch", _eager, auto_compile=True),
    )
}

DEFAULT_STRATEGIES = ("eager", "torch-regional", "baked", "ordered", "hoisted", "stamped")
GPU_STRATEGIES = ("eager", "torch-regional", "torch-static", "stamped-launches", "stamped")
"""Those to compare on a GPU by default."""


def get_strategy(name: str) -> Strategy:
    """The strategy of that name.

    Raises:
        UsageError: there is none; the message lists them.
    """
    if name not in STRATEGIES:
        raise UsageError(f"unknown strategy {name!r}; strategies: {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def hit_recompile_limit() -> bool:
    """Whether Dynamo hit its recompile limit for some function in this process and left its later calls eager."""
    counters: Any = torch._dynamo.utils.counters
    return any("recompile limit" in str(reason).lower() for table in counters.values() for reason in table)
