"""Pauses Python's garbage collector while a program is built. A trace creates millions of live objects, and scanning
them again and again would take a tenth of a cold start."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from glowplug.runtime.forks import in_forks, make_lock

_FEW = 10_000
"""Frozen objects that are not somebody's: Python 3.12 starts with hundreds. A server that forks freezes more."""
_lock = make_lock()
_pauses: Counter[int] = Counter()
"""Number of pauses by thread."""
_resume = False


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause collection in all threads; when the last pause ends, the collector is as it was before the first.

    The objects created meanwhile move to the oldest generation. Otherwise the next collection, which would come at
    once, would scan all of them.
    """
    global _resume
    thread = threading.get_ident()
    with _lock:
        if not _pauses:
            _resume = gc.isenabled()
            gc.disable()
        _pauses[thread] += 1
    try:
        yield
    finally:
        with _lock:
            _pauses[thread] -= 1
            _end_pauses([thread] if _pauses[thread] == 0 else [])


def _end_pauses(threads: list[int]) -> None:
    """Drop the pauses of some threads; after the last one, collection resumes."""
    for thread in threads:
        del _pauses[thread]
    if threads and not _pauses and _resume:
        if gc.get_freeze_count() <= _FEW:  # else this would unfreeze the objects of somebody else
            gc.freeze()
            gc.unfreeze()
        gc.enable()


@in_forks
def _end_pauses_of_others() -> None:
    _end_pauses([thread for thread in _pauses if thread != threading.get_ident()])
