"""The program: the flat list of steps that runs a model, bound to its weights."""

from glowplug.program.build import Built, begin_pieces, build_program
from glowplug.program.candidate import Candidate, Traced
from glowplug.program.piece_store import PieceStore
from glowplug.program.pieces import PieceCache
from glowplug.program.plan import Plan
from glowplug.program.program import Program
from glowplug.program.slots import PieceSlot, with_arrived

__all__ = [
    "Built",
    "Candidate",
    "PieceCache",
    "PieceSlot",
    "PieceStore",
    "Plan",
    "Program",
    "Traced",
    "begin_pieces",
    "build_program",
    "with_arrived",
]
