"""The one place where warnings and log lines of other libraries are filtered: those that nothing glowplug does can
avoid. Where one says that something runs uncompiled, glowplug says so itself, in the report and in a line of its own.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

_Filters = Sequence[tuple[str, type[Warning]]]
_TRACING: _Filters = (
    # The trace goes through the function behind a functools.lru_cache. What that changes the comparison finds.
    (r"Dynamo detected a call to a `functools\.lru_cache`-wrapped function", UserWarning),
    # Says what the reason of the graph break says.
    (r"Dynamo (does not know how to trace the builtin|cannot trace optree)", UserWarning),
)
_COMPILING: _Filters = (
    # Importing Inductor imports torch.utils.mkldnn, which defines torch.jit modules.
    (r"`torch\.jit\.script(_method)?` is deprecated", DeprecationWarning),
    # Inductor advises to allow TF32 products, which are beyond the tolerance of the comparison with eager.
    (r"TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled", UserWarning),
    # Complex numbers are computed as in eager.
    (r"Torchinductor does not support code generation for complex operators", UserWarning),
    # Python 3.12 advises not to fork a process with threads. The forks use none of their locks, and have a time limit.
    (r".*use of fork\(\) may lead to deadlocks in the child", DeprecationWarning),
)
"""The beginnings of the messages, as regular expressions, and their categories. Checked on torch 2.13."""
RETRACED = "torch._dynamo hit config."
"""The beginning of Dynamo's log line when it has traced a function too often, and runs it eager from then on."""
_LINES = {
    "torch._dynamo.convert_frame": RETRACED,
    # The reason of the graph break says that the code asks for the values of a tensor.
    "torch._dynamo.variables.tensor": "Graph break from `Tensor.item()`",
}
"""Logger -> the beginning of the line."""


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore the known warnings and log lines in the block, even where warnings are errors."""
    with warnings.catch_warnings(), quiet_log():
        _ignore((*_TRACING, *_COMPILING))
        yield


@contextmanager
def quiet_log() -> Iterator[list[str]]:
    """Drop the known log lines of this thread in the block; yields a list that receives them."""
    dropped: list[str] = []
    thread = threading.get_ident()

    def keeps(record: logging.LogRecord) -> bool:
        known = record.thread == thread and str(record.msg).startswith(_LINES[record.name])
        if known:
            dropped.append(str(record.msg))
        return not known

    with ExitStack() as stack:
        for name in _LINES:
            logger = logging.getLogger(name)
            logger.addFilter(keeps)
            stack.callback(logger.removeFilter, keeps)
        yield dropped


def quiet_traces() -> None:
    """Ignore the known warnings of traces from now on, for code that Dynamo may trace again at any call."""
    _ignore(_TRACING)


def _ignore(known: _Filters) -> None:
    for message, category in known:
        warnings.filterwarnings("ignore", message, category)
