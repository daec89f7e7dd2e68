"""The program: the flat list of steps that runs a model, bound to its weights."""

from glowplug.program.build import PieceCache, build_program
from glowplug.program.program import Program

__all__ = ["PieceCache", "Program", "build_program"]
