"""The program: the flat list of steps that runs a model, bound to its weights."""

from glowplug.program.build import Built, Stamping, build_program
from glowplug.program.end_makers import Build, StoreMaker
from glowplug.program.ends import Ends
from glowplug.program.piece_store import PieceStore
from glowplug.program.pieces import PieceCache
from glowplug.program.plan import Plan
from glowplug.program.program import Program

__all__ = [
    "Build",
    "Built",
    "Ends",
    "PieceCache",
    "PieceStore",
    "Plan",
    "Program",
    "Stamping",
    "StoreMaker",
    "build_program",
]
