"""Piece compilers: turn a piece and its fake inputs into a callable."""

from __future__ import annotations

from glowplug.compilers.base import PieceCompiler
from glowplug.compilers.eager import EagerCompiler
from glowplug.compilers.gpu.warm import quick_tuning
from glowplug.compilers.inductor import InductorCompiler
from glowplug.errors import CompileError, UsageError
from glowplug.runtime.forks import begin_thread

__all__ = [
    "EagerCompiler",
    "InductorCompiler",
    "PieceCompiler",
    "cool_down",
    "get_compiler",
    "quick_tuning",
    "warm_up",
    "warm_up_loading",
    "why_unable",
]


def get_compiler(choice: str | PieceCompiler) -> PieceCompiler:
    """The compiler named `"inductor"` or `"eager"`, or `choice` itself if it is one; UsageError for anything else."""
    if not isinstance(choice, str):
        if callable(getattr(choice, "compile", None)) and isinstance(getattr(choice, "name", None), str):
            return choice
        raise UsageError(f"a piece compiler has a `name` and a method `compile(piece, inputs)`; {choice!r} does not")
    if choice == "inductor":
        return InductorCompiler()
    if choice == "eager":
        return EagerCompiler()
    raise UsageError(f"unknown compiler {choice!r}; choose 'inductor' or 'eager', or pass a PieceCompiler")


def why_unable(compiler: PieceCompiler, device_type: str) -> str | None:
    """Why a compiler can't compile for a device here, in one sentence; None if it reports no problem."""
    ask = getattr(compiler, "problem", None)
    problem: str | None = ask(device_type) if ask is not None else None
    return problem


def warm_up(compiler: PieceCompiler, device_type: str) -> None:
    """Start a compiler's one-off work, if it has any; CompileError if it can't compile for the device."""
    problem = why_unable(compiler, device_type)
    if problem is not None:
        raise CompileError(problem)
    begin = getattr(compiler, "warm_up", None)
    if begin is not None:
        begin(device_type)


def cool_down(compiler: PieceCompiler) -> None:
    """End what a compiler's `warm_up` started and nothing needs any more."""
    end = getattr(compiler, "cool_down", None)
    if end is not None:
        end()


def warm_up_loading(compiler: PieceCompiler) -> None:
    """Start, in a thread, a compiler's one-off work for loading stored pieces, if it has any."""
    begin = getattr(compiler, "warm_up_loading", None)
    if begin is not None:
        begin_thread(begin, "glowplug-warm-up")
