"""The options of `glowplug.compile`: one frozen, validated dataclass."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from glowplug.compilers import PieceCompiler, get_compiler
from glowplug.compilers.base import StoringCompiler
from glowplug.errors import UsageError
from glowplug.layers.registry import Identity

_CHOICES: dict[str, tuple[object, ...]] = {
    "identity": ("auto", "hoisted", "ordered", "baked"),
    "experts": ("auto", "inline", "opaque"),
    "fast_moe_cold_start": (None, True, False),
    "strict": (True, False),
    "verify": ("once", "off"),
    "stamp": ("auto", "off"),
    "inside": ("auto", "compiled", "eager"),
    "ends": ("auto", "compiled"),
    "background": (True, False),
    "cuda_graphs": ("auto", "off"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is compiled.

    Attributes:
        identity: how layer ops identify their layer. `"hoisted"`: by a graph input. `"ordered"`: by the order in which
            layers were created, as in vLLM's pull request 32805. `"baked"`: by a name in the graph, as before it.
            `"auto"`: as `fast_moe_cold_start` says.
        experts: `"inline"`: the experts stay in the graph. `"opaque"`: they run behind a layer op. `"auto"`: opaque on
            Linux CPUs, where their op bodies are compiled too; elsewhere inline if they can be traced.
        compiler: `"inductor"`, `"eager"` (runs pieces uncompiled, for tests and debugging), or a `PieceCompiler`.
        fast_moe_cold_start: vLLM's switch. True: ordered. False: baked. None: the best safe way, hoisted.
        strict: raise `NotServableError` instead of running eager.
        verify: `"once"`: compare a program with eager, on small seeded inputs, before it serves. `"off"`: don't; a
            layer that differs from others of its kind in a way that its attributes don't show then goes unnoticed.
        stamp: `"auto"`: trace a short template and stamp it over the full depth if identity is hoisted and the model
            allows it. `"off"`: trace every layer.
        inside: the op bodies of opaque experts, and of attention that runs several kernels. `"auto"`: on Linux CPUs,
            where it costs the start nothing, compile one for each group of equal layers in the background, and use it
            from the next sequence on if a trial finds it faster. `"compiled"`: compile them before the first answer,
            on any device. `"eager"`: never compile them, and attend by the layers' own functions on a GPU, too, where
            a step of one token otherwise takes fewer kernels.
        cache_dir: the artifact store: a folder, an fsspec URL, or `"off"`; None: `GLOWPLUG_CACHE`, or else the current
            user's own store. See `glowplug.store.open_store`.
        background: serve eagerly at once; another process builds the program, which takes over between two calls.
        ends: pieces that seldom run, such as a deep model's first and last. `"auto"`: on Linux CPUs they are deferred
            pieces, which run uncompiled until their code arrives and use it from the next sequence on. `"compiled"`:
            compile them before the first answer, as `strict` always does.
        cuda_graphs: `"auto"`: on NVIDIA GPUs, record each decode step over a static cache as a CUDA graph at the second
            step of its form, and replay it since; over a growing cache, each piece between attention ops. `"off"`:
            launch each kernel from Python.

    Raises:
        UsageError: a value is not allowed, or two options contradict each other.
    """

    identity: Literal["auto", "hoisted", "ordered", "baked"] = "auto"
    experts: Literal["auto", "inline", "opaque"] = "auto"
    compiler: str | PieceCompiler = "inductor"
    fast_moe_cold_start: bool | None = None
    strict: bool = False
    verify: Literal["once", "off"] = "once"
    stamp: Literal["auto", "off"] = "auto"
    inside: Literal["auto", "compiled", "eager"] = "auto"
    ends: Literal["auto", "compiled"] = "auto"
    cache_dir: str | os.PathLike[str] | None = None
    background: bool = False
    cuda_graphs: Literal["auto", "off"] = "auto"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
                raise UsageError(f"{name} must be one of {', '.join(map(repr, allowed))}; not {value!r}")
        get_compiler(self.compiler)
        if self.cache_dir is not None and not isinstance(self.cache_dir, (str, os.PathLike)):
            raise UsageError(f"cache_dir must be a folder, a URL, 'off' or None; not {self.cache_dir!r}")
        if self.background and self.strict:
            raise UsageError("background=True serves eager until the program is built, and strict=True forbids eager")
        if self.background and not isinstance(get_compiler(self.compiler), StoringCompiler):
            raise UsageError("background=True needs a compiler whose pieces can be stored, such as 'inductor'")
        wanted = {True: "ordered", False: "baked"}.get(self.fast_moe_cold_start)  # type: ignore[arg-type]
        if wanted is not None and self.identity not in ("auto", wanted):
            raise UsageError(
                f"fast_moe_cold_start={self.fast_moe_cold_start} means identity={wanted!r}, but identity is "
                f"{self.identity!r}; give one of the two"
            )
        if self.background and self.resolved_identity != "hoisted":
            raise UsageError(f"background=True needs identity='hoisted', not {self.resolved_identity!r}")

    @property
    def resolved_identity(self) -> Identity:
        """The identity to use, with `"auto"` resolved by `fast_moe_cold_start`."""
        if self.identity != "auto":
            return self.identity
        if self.fast_moe_cold_start is None:
            return "hoisted"
        return "ordered" if self.fast_moe_cold_start else "baked"
