"""Hands pieces over to a helper of the compiler, which compiles them while this process traces on or compares."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from glowplug.compilers.base import PieceCompiler
from glowplug.errors import NotCarriableError
from glowplug.graph.capture import Captured, specialises
from glowplug.graph.carried import carry
from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.shapes import symbolic_sizes
from glowplug.graph.split import Piece
from glowplug.program.pieces import HandedOver, PieceCache

logger = logging.getLogger("glowplug")


def hand_over(
    work: Callable[..., None],
    pieces: Mapping[Fingerprint, Piece],
    compiler: PieceCompiler,
    cache: PieceCache,
    captured: Captured,
) -> HandedOver | None:
    """Let a helper of the compiler do `work`, see `compile_carried`, on the pieces of a capture. None if there is no
    helper, or it can't take them."""
    begin = getattr(compiler, "hand_over", None)
    channel = cache.channel(compiler) if begin is not None and pieces else None
    if begin is None or channel is None or not all(map(channel.takes, pieces)):
        return None
    try:
        graphs = carry([piece.gm for piece in pieces.values()])
    except NotCarriableError as exc:
        logger.debug("glowplug: pieces can't be compiled by a helper: %s", exc)
        return None
    digests = [fingerprint.digest for fingerprint in pieces]
    job = begin(work, graphs, digests, specialises(), channel.store, channel.environment)
    return HandedOver(job, channel, frozenset(pieces), symbolic_sizes(captured)) if job is not None else None


def taken_ahead(pieces: Mapping[Fingerprint, Piece], cache: PieceCache, captured: Captured) -> HandedOver | None:
    """Take what was handed over before a capture, if it has pieces of that, whose guards on sizes it can take over."""
    ahead = cache.take_ahead()
    if ahead is None or ahead.pieces.isdisjoint(pieces) or ahead.sizes != symbolic_sizes(captured):
        return None
    outcome = ahead.job.outcome()
    return ahead if outcome is None or outcome.reason is None else None
