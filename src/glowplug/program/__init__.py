"""The program: the flat list of steps that runs a model, bound to its weights."""

from glowplug.program.build import Built, PieceCache, Stamping, build_program
from glowplug.program.program import Program

__all__ = ["Built", "PieceCache", "Program", "Stamping", "build_program"]
