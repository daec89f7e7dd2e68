"""The program: the flat list of steps that runs a model, bound to its weights."""

from glowplug.program.build import Built, Stamping, build_program
from glowplug.program.pieces import PieceCache, PieceStore
from glowplug.program.plan import Plan
from glowplug.program.program import Program

__all__ = ["Built", "PieceCache", "PieceStore", "Plan", "Program", "Stamping", "build_program"]
