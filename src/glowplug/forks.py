"""Forks of this process, whoever makes them, such as a server that loads a model once for all its workers.

A fork has a copy of the memory, and of one thread: the one that made it. Locks that other threads held are never
released there, and GNU OpenMP waits for its threads, which are gone. So a fork begins when captures of other threads
are over, if that is soon; OpenMP's threads end before it and are made anew after it, on both sides; and in the fork
locks that nobody there can release are made anew. What belongs to the process that made it (its forks, its folders) is
left alone.

Holds for what calls Python's hooks: `os.fork`, `multiprocessing`. Code in C that forks by itself must call them, too.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import torch

_PATIENCE_S = 5.0
"""How long a fork waits for captures of other threads, and for threads of glowplug's own."""

_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_awaited: weakref.WeakSet[Any] = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_renewals: list[Callable[[], None]] = []
_thread = threading.local()
"""Of the thread that forks: `held`, the locks that it took for that; `plain`, whether it forks for glowplug."""


def make_lock(*, awaited: bool = False) -> Any:
    """A re-entrant lock. In a fork it is free, unless the thread that forked holds it.

    Args:
        awaited: forks wait for it, shortly.
    """
    lock = threading.RLock()
    free_in_forks(lock)
    if awaited:
        _awaited.add(lock)
    return lock


def free_in_forks(lock: Any) -> None:
    """Let a re-entrant lock be free in forks, unless the thread that forked holds it."""
    _locks.add(lock)


def in_forks(renew: Callable[[], None]) -> Callable[[], None]:
    """Call a function in each fork, before anything else runs there. A decorator."""
    _renewals.append(renew)
    return renew


def begin(work: Callable[[], None], name: str) -> threading.Thread:
    """Start a thread that ends by itself before long. A fork waits for it, shortly: imports that it is in the middle of
    would never end there."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    _threads.add(thread)
    thread.start()
    return thread


def finalize(owner: Any, work: Callable[[], Any]) -> weakref.finalize[Any, Any]:
    """Call `work` when `owner` goes, at the latest when this process ends; but never in a fork of it."""
    return weakref.finalize(owner, _here, os.getpid(), work)


def _here(process: int, work: Callable[[], Any]) -> None:
    if os.getpid() == process:
        work()


class Scratch:
    """A folder that is deleted with this object, by the process that made it alone. A context manager.

    Args:
        what: what it is for.

    Attributes:
        home: where such folders are made in this process; None: where the system has them.
        path: the folder.
        ours: whether this process made it.
    """

    home: ClassVar[str | None] = None

    def __init__(self, what: str) -> None:
        self._process = os.getpid()
        self.path = path = Path(tempfile.mkdtemp(prefix=f"glowplug-{what}-", dir=Scratch.home))
        self._finalizer = finalize(self, lambda: shutil.rmtree(path, ignore_errors=True))

    @property
    def ours(self) -> bool:
        return self._process == os.getpid()

    def cleanup(self) -> None:
        """Delete it now."""
        self._finalizer()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.cleanup()


def fork_plainly() -> int:
    """`os.fork` that waits for nothing: by a thread that may hold what others wait for. The child must not run a
    parallel region of OpenMP."""
    _thread.plain = True
    try:
        return os.fork()
    finally:
        _thread.plain = False


def _find_pause() -> Callable[[int], int] | None:
    """The function by which OpenMP (5.0) ends its threads; the next parallel region has new ones. None: there is none
    (Windows, macOS, whose OpenMP does that by itself), or it is too old."""
    if not sys.platform.startswith("linux"):
        return None
    with suppress(OSError, AttributeError):
        return ctypes.CDLL(torch._C.__file__).omp_pause_resource_all
    return None  # pragma: no cover - depends on the torch installed


_pause = _find_pause()
_SOFT = 1
"""`omp_pause_soft`: threads end, settings stay."""


def _before() -> None:
    _thread.held = held = []
    if getattr(_thread, "plain", False):
        return
    deadline = time.monotonic() + _PATIENCE_S
    for thread in list(_threads):
        if thread is not threading.current_thread() and thread.ident is not None:
            thread.join(max(deadline - time.monotonic(), 0))
    for lock in list(_awaited):
        if lock.acquire(timeout=max(deadline - time.monotonic(), 0)):
            held.append(lock)
    if _pause is not None:
        _pause(_SOFT)


def _release() -> None:
    for lock in getattr(_thread, "held", ()):
        lock.release()
    _thread.held = []


def _in_child() -> None:
    _release()
    for lock in list(_locks):
        if lock.acquire(blocking=False):  # nobody holds it, or this thread does
            lock.release()
        else:
            lock._at_fork_reinit()  # as the standard library does with its own
    _threads.clear()
    if _pause is None and sys.platform.startswith("linux"):  # pragma: no cover - depends on the torch installed
        torch.set_num_threads(1)  # so that OpenMP's threads, which are gone, are never waited for
    for renew in _renewals:
        renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_release, after_in_child=_in_child)
