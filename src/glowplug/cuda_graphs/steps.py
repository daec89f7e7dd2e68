"""What recordings need to know of a decode step; a front end describes its own."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor


class FixedStep(Protocol):
    """One step of a sequence over a cache of fixed extent, as far as it is not in the inputs of the program."""

    grows: ClassVar[Literal[False]]

    @property
    def cache(self) -> Any:
        """The cache of the sequence, which the recordings of its steps live with."""
        ...

    @property
    def phase(self) -> Hashable:
        """What the cache's code does, where Python values decide it."""
        ...

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The tensors of the cache, which a run reads and writes."""
        ...

    def rebind(self, tensors: Sequence[Tensor]) -> None:
        """Let the cache hold other tensors in the place of these."""
        ...

    def recordable(self) -> Any:
        """The cache as a recorded run uses it: it changes tensors alone, in place, and no Python value."""
        ...

    def advance(self) -> None:
        """Change the Python values of the cache as a run would have done."""
        ...


class GrowingStep(Protocol):
    """One step of a sequence over a cache that grows. The cache's code runs at each step, and copies its inputs."""

    grows: ClassVar[Literal[True]]

    @property
    def cache(self) -> Any:
        """The cache of the sequence."""
        ...

    @property
    def sizes(self) -> Hashable:
        """The sizes of the step's input."""
        ...


Step = FixedStep | GrowingStep
