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
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is compiled.

    Attributes:
        identity: how layer ops say which layer they are. `"hoisted"`: by a graph input. `"ordered"`: by the order of
            creation, as vLLM's pull request 32805 did. `"baked"`: by a name in the graph, as before it. `"auto"`:
            what `fast_moe_cold_start` says.
        experts: `"inline"`: the experts stay in the graph. `"opaque"`: they run behind a layer op. `"auto"`: opaque
            where their inside is compiled, too (on Linux CPUs); elsewhere inline, if they can be traced.
        compiler: `"inductor"`, `"eager"` (runs pieces uncompiled: tests, debugging), or a `PieceCompiler`.
        fast_moe_cold_start: vLLM's switch. True: ordered. False: baked. None: the best safe way, hoisted.
        strict: raise `NotServableError` where eager would run instead.
        verify: `"once"`: before a program serves, compare it once with eager on a small seeded input. `"off"`: don't;
            a layer that behaves like no other of its kind, without it showing in the layer, then goes unnoticed.
        stamp: `"auto"`: trace a short template and stamp it over the full depth, where identity is hoisted and the
            model allows it. `"off"`: trace every layer.
        inside: of opaque experts, and of attention that is several kernels. `"auto"`: it is compiled once a kind beside
            serving, where that costs the start nothing (on Linux CPUs), and used from the next sequence on where a
            trial finds it faster. Attention's needs `verify="once"`, which shows how it is called.
            `"compiled"`: before the first answer, on any device. `"eager"`: never.
        cache_dir: the artifact store: a folder, an fsspec URL, or `"off"`; None: `GLOWPLUG_CACHE`, or else this user's
            own. See `glowplug.store.open_store`.
        background: answer at once, in eager; another process builds the program, which takes over between two calls.
        ends: pieces that run seldom in a step, such as a deep model's first and last. `"auto"`: they start uncompiled
            and are compiled beside serving (on Linux CPUs), to be used from the next sequence on. `"compiled"`: before
            the first answer; always so with `strict`.

    Raises:
        UsageError: a value is not allowed, or `identity` contradicts `fast_moe_cold_start`.
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
        """The identity that `"auto"` and `fast_moe_cold_start` come to."""
        if self.identity != "auto":
            return self.identity
        if self.fast_moe_cold_start is None:
            return "hoisted"
        return "ordered" if self.fast_moe_cold_start else "baked"
