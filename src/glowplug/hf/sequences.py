"""What each sequence under way runs: a piece or an op body that arrives later is used from the next sequence on."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import Cache

from glowplug.bodies import InUse
from glowplug.program import Program


@dataclass(frozen=True)
class Running:
    """What a sequence runs from its beginning to its end.

    Attributes:
        program: the program.
        bodies: the op bodies.
    """

    program: Program
    bodies: InUse


class Sequences:
    """The sequences that one program serves, by their cache."""

    def __init__(self) -> None:
        self._running: dict[int, tuple[weakref.ref[Cache], Running]] = {}

    def begin(self, cache: Cache | None, running: Running) -> Running:
        """A sequence begins with a cache; one without ends with its first call."""
        if cache is not None:
            number, running_by = id(cache), self._running

            def forget(_: Any) -> None:
                running_by.pop(number, None)

            try:
                self._running[number] = weakref.ref(cache, forget), running
            except TypeError:  # a cache of a class without weak references goes with the latest
                running_by.pop(number, None)
        return running

    def of(self, cache: Cache | None) -> Running | None:
        """What the sequence of a cache runs; None when it began elsewhere, such as in eager."""
        found = self._running.get(id(cache))
        return found[1] if found is not None and found[0]() is cache else None
