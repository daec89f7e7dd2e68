"""Python's garbage collector stands still while a program is built: a trace makes millions of objects, none of them
garbage yet, and looking through them, once or again and again, takes a tenth of a cold start."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_pauses = 0
_resume = False


@contextmanager
def collector_paused() -> Iterator[None]:
    """No collection inside, in any thread; afterwards the collector is as it was before the first pause.

    What was made inside counts as old then, so that the first collection afterwards, which would come at once, does not
    go through all of it.
    """
    global _pauses, _resume
    with _lock:
        if _pauses == 0:
            _resume = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses -= 1
            if _pauses == 0 and _resume:
                if gc.get_freeze_count() == 0:  # nobody froze anything that this would thaw
                    gc.freeze()
                    gc.unfreeze()
                gc.enable()
