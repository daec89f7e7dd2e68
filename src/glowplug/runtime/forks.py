"""Makes forks of this process safe, such as those of a server that loads a model once for all its workers.

A fork copies the memory but only the thread that forked. Locks of other threads are never released there, and GNU
OpenMP would wait for threads that no longer exist. Therefore:
- a fork waits, for a limited time, until other threads have finished their captures;
- OpenMP's threads end before the fork, and both processes start new ones on demand;
- the fork reinitialises locks that no thread in it can release;
- the fork leaves alone what belongs to its parent, such as the parent's jobs and folders.

This relies on Python's fork hooks, which `os.fork` and `multiprocessing` call. C code that forks must call them itself.
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import torch

_PATIENCE_S = 5.0
"""How long a fork waits for other threads' captures and for glowplug's own threads."""

_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_awaited: weakref.WeakSet[Any] = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_fork_hooks: list[Callable[[], None]] = []
_thread = threading.local()
"""State of the forking thread: `locks`, the locks it took for the fork; `plain`, whether it is in `fork_plainly`."""


def make_lock(*, awaited: bool = False) -> Any:
    """A re-entrant lock that is free in a fork, unless the forking thread holds it. If `awaited`, forks wait for it for
    a limited time."""
    lock = threading.RLock()
    free_in_forks(lock)
    if awaited:
        _awaited.add(lock)
    return lock


def free_in_forks(lock: Any) -> None:
    """Make a re-entrant lock free in forks, unless the forking thread holds it."""
    _locks.add(lock)


def in_forks(hook: Callable[[], None]) -> Callable[[], None]:
    """Decorator: call a function in each fork before anything else runs there."""
    _fork_hooks.append(hook)
    return hook


def begin_thread(work: Callable[[], None], name: str) -> threading.Thread:
    """Start a short-lived thread. A fork waits for it for a limited time, as imports that the thread has begun would
    never finish in the fork."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    _threads.add(thread)
    thread.start()
    return thread


def finalize(owner: Any, work: Callable[[], Any]) -> weakref.finalize[Any, Any]:
    """Call `work` when `owner` is collected or this process exits, but never in a fork of this process."""
    return weakref.finalize(owner, _call_in, os.getpid(), work)


def _call_in(process: int, work: Callable[[], Any]) -> None:
    if os.getpid() == process:
        work()


class Scratch:
    """A temporary folder, also a context manager. Only the process that created it deletes it, with this object.

    Attributes:
        home: where this process creates such folders; None for the system's temporary folder.
        path: the folder.
        ours: whether this process created it.
    """

    home: ClassVar[str | None] = None

    def __init__(self, what: str) -> None:
        self._process = os.getpid()
        self.path = path = Path(tempfile.mkdtemp(prefix=f"glowplug-{what}-", dir=Scratch.home))
        self._finalizer = finalize(self, lambda: shutil.rmtree(path, ignore_errors=True))

    @property
    def ours(self) -> bool:
        return self._process == os.getpid()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self._finalizer()


def fork_plainly() -> int:
    """`os.fork` without waiting, for a thread that may hold a lock that others wait for. The child must not run a
    parallel OpenMP region."""
    _thread.plain = True
    try:
        return os.fork()
    finally:
        _thread.plain = False


def fork_workers(tasks: Sequence[Callable[[], None]]) -> None:
    """Run each task in a fork of its own, at once, and wait until all have ended. A fork that fails says nothing."""
    children = []
    for task in tasks:
        child = fork_plainly()
        if child == 0:
            try:
                task()
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def _find_pause() -> Callable[[int], int] | None:
    """OpenMP 5.0's function that ends its threads; the next parallel region starts new ones. None if OpenMP is too old,
    and on Windows and macOS, where OpenMP survives forks by itself."""
    if not sys.platform.startswith("linux"):
        return None
    with suppress(OSError, AttributeError):
        return ctypes.CDLL(torch._C.__file__).omp_pause_resource_all
    return None  # pragma: no cover - depends on the torch installed


_pause = _find_pause()
_SOFT = 1
"""`omp_pause_soft`: ends the threads and keeps the settings."""


def await_threads(patience_s: float = _PATIENCE_S) -> None:
    """Wait for glowplug's own threads for a limited time: a module that one of them imports can't be imported in a fork
    that lacks the thread."""
    deadline = time.monotonic() + patience_s
    for thread in list(_threads):
        if thread is not threading.current_thread() and thread.ident is not None:
            thread.join(max(deadline - time.monotonic(), 0))


def _before() -> None:
    _thread.locks = locks = []
    if getattr(_thread, "plain", False):
        return
    deadline = time.monotonic() + _PATIENCE_S
    await_threads()
    for lock in list(_awaited):
        if lock.acquire(timeout=max(deadline - time.monotonic(), 0)):
            locks.append(lock)
    if _pause is not None:
        _pause(_SOFT)


def _release() -> None:
    for lock in getattr(_thread, "locks", ()):
        lock.release()
    _thread.locks = []


def _in_child() -> None:
    _release()
    for lock in list(_locks):
        if lock.acquire(blocking=False):  # free, or held by this thread
            lock.release()
        else:
            lock._at_fork_reinit()  # as the standard library does with its own locks
    _threads.clear()
    if _pause is None and sys.platform.startswith("linux"):  # pragma: no cover - depends on the torch installed
        torch.set_num_threads(1)  # else OpenMP would wait for threads that are gone
    for hook in _fork_hooks:
        hook()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_release, after_in_child=_in_child)
