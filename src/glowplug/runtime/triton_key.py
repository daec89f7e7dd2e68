"""Triton's hash of itself, by which it names compiled kernels. It reads 400 MB for that, for a third of a second and
more. So a process that loads compiled pieces takes the hash from the process that compiled them, for glowplug's own
kernels, which are stored with the pieces. Uses `triton.runtime.cache.triton_key` (private; checked on Triton 3.6);
without it, Triton hashes itself.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar, Token
from typing import Any


class TritonKey:
    """The hash, as far as this process knows it from stored pieces."""

    def __init__(self) -> None:
        self._known: str | None = None
        self._given: ContextVar[str | None] = ContextVar("glowplug_triton_key", default=None)

    def learn(self, key: str | None) -> None:
        """Take a hash from a piece; the first one stays."""
        if key is not None and self._known is None:
            self._patch_triton()
            self._known = key

    def give(self) -> Token[str | None]:
        """Let Triton use the known hash in this thread, until the token is passed to `withdraw`."""
        return self._given.set(self._known)

    def withdraw(self, token: Token[str | None]) -> None:
        """See `give`."""
        self._given.reset(token)

    def read(self) -> str | None:
        """Triton's own answer, for pieces that are compiled here; None if there is no Triton."""
        from torch._inductor.runtime.triton_compat import HAS_TRITON, triton_key

        return str(triton_key()) if HAS_TRITON else None

    def _patch_triton(self) -> None:
        """The patch is permanent, so that no thread or fork sees it half applied."""
        from triton.runtime import cache

        own: Any = getattr(cache, "triton_key", None)
        if own is None:  # pragma: no cover - depends on the Triton installed
            return

        @functools.wraps(own)
        def triton_key() -> Any:
            return self._given.get() or own()

        cache.triton_key = triton_key


TRITON_KEY = TritonKey()
"""That of this process."""
