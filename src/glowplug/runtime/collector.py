"""Python's garbage collector stands still while a program is built: a trace makes millions of objects, none of them
garbage yet, and looking through them, once or again and again, takes a tenth of a cold start."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from glowplug.runtime.forks import in_forks, make_lock

_lock = make_lock()
_pauses: Counter[int] = Counter()
"""How often each thread has paused it."""
_resume = False


@contextmanager
def collector_paused() -> Iterator[None]:
    """No collection inside, in any thread; afterwards the collector is as it was before the first pause.

    What was made inside counts as old then, so that the first collection afterwards, which would come at once, does not
    go through all of it.
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
    """Forget the pauses of threads; after the last one the collector goes on."""
    for thread in threads:
        del _pauses[thread]
    if threads and not _pauses and _resume:
        if gc.get_freeze_count() == 0:  # nobody froze anything that this would thaw
            gc.freeze()
            gc.unfreeze()
        gc.enable()


@in_forks
def _end_pauses_of_others() -> None:
    _end_pauses([thread for thread in _pauses if thread != threading.get_ident()])
