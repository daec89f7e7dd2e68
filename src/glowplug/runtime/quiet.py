"""The one place where warnings of other libraries are filtered: those that nothing glowplug does can avoid."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_UNAVOIDABLE: tuple[tuple[str, type[Warning]], ...] = (
    # Importing Inductor imports torch.utils.mkldnn, which defines torch.jit modules. Checked on torch 2.13.
    (r"`torch\.jit\.script(_method)?` is deprecated", DeprecationWarning),
    # Inductor advises to allow TF32 products, which are beyond the tolerance of the comparison with eager.
    (r"TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled", UserWarning),
    # Python 3.12 advises not to fork a process with threads. The forks use none of their locks, and have a time limit.
    (r".*use of fork\(\) may lead to deadlocks in the child", DeprecationWarning),
)
"""The beginnings of the messages, as regular expressions, and their categories."""


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore the unavoidable warnings in the block, even where warnings are errors."""
    with warnings.catch_warnings():
        for message, category in _UNAVOIDABLE:
            warnings.filterwarnings("ignore", message, category)
        yield
