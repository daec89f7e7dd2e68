"""Op bodies: the compiled insides of opaque ops (experts, attention of several kernels), one for all layers of a group,
used where they are faster.

On a CPU a job makes them while the model serves already; a body takes over when a sequence begins. What its trace read
is watched; a body whose layers changed is not run.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from glowplug.background.job import Job
from glowplug.bodies.bound import BoundBody, InUse
from glowplug.bodies.group import Group
from glowplug.bodies.make import Body, make_body
from glowplug.bodies.stored import StoredBody, drop_body, keep_body, make_missing, read_body
from glowplug.bodies.trial import Verdict, try_body
from glowplug.compilers import PieceCompiler
from glowplug.compilers.base import StoringCompiler
from glowplug.errors import CaptureError
from glowplug.layers.watch import ReadWatch
from glowplug.program import PieceStore
from glowplug.report import InsideReport, Report
from glowplug.runtime.forks import make_lock
from glowplug.store.address import changed_global

logger = logging.getLogger("glowplug")
Piece = Callable[..., Sequence[Tensor]]


class Bodies:
    """The op bodies of one model.

    Args:
        groups: the layers that they are for.
        compiler: compiles them.
        report: receives what was found.
        pieces: the user's store, if there is one.

    Attributes:
        in_use: those that a sequence is to run that begins now.
        job: makes them.
    """

    def __init__(
        self, groups: Sequence[Group], compiler: PieceCompiler, report: Report, pieces: PieceStore | None = None
    ) -> None:
        self.compiler = compiler
        self.report = report
        self.pieces = pieces
        self.in_use = InUse()
        self.job: Job | None = None
        self._temporary: PieceStore | None = None
        self._groups = list(groups)
        self._lock = make_lock()

    @property
    def pending(self) -> bool:
        """Whether bodies are being made, or wait to be tried."""
        return bool(self._groups)

    def compile_here(self) -> None:
        """Make and try them all, now."""
        for group in self._groups:
            if not self._take(group):
                with contextlib.suppress(CaptureError):
                    body, (piece, artifact) = make_body(group, self._compile)
                    self._use(group, piece, StoredBody(body, artifact))
        self._groups = []

    def compile_for_others(self) -> None:
        """Make those that are not in the user's store, for a process that has weights to try them with."""
        pieces = self.pieces
        if pieces is not None:
            make_missing([(group, pieces) for group in self._groups if group.address is not None])
        self._groups = []

    def compile_in_background(self) -> None:
        """Use those that have been tried, and begin to make those that are missing, where a fork can do it."""
        waiting, missing = [], []
        for group in self._groups:
            pieces = self._store_of(group)
            stored = read_body(pieces, group) if pieces is not None else None
            if stored is not None and stored.verdict is None:
                waiting.append(group)
            elif pieces is not None and not self._take(group):
                missing.append((group, pieces))
        self._groups = waiting
        compiler: Any = self.compiler
        if missing and missing[0][0].device.type == "cpu" and compiler.forks([]):
            self._groups += [group for group, _ in missing]
            self.job = Job.fork(lambda _: make_missing(missing))

    def poll(self, deadline: float | None = None) -> None:
        """Try the bodies that were made, and put them to use, once no more are being made.

        Args:
            deadline: wait for that until then (`time.monotonic()`); None: don't wait.
        """
        wait = max(deadline - time.monotonic(), 0) if deadline is not None else 0
        if not self._lock.acquire(timeout=wait):
            return  # another thread tries them; serving goes on
        try:
            if self.job is not None and not self.job.ours:
                self.job = self._temporary = None
                self.compile_in_background()
            if self.job is not None and not self.job.ended(deadline):
                return
            self.job = None
            groups, self._groups = self._groups, []
            for group in groups:
                self._take(group)
        finally:
            self._lock.release()

    def _store_of(self, group: Group) -> PieceStore | None:
        """Where a group's body is kept: the user's store, or one of this process, for jobs to hand it over."""
        if self.pieces is not None and group.address is not None:
            return self.pieces
        if self._temporary is None and isinstance(self.compiler, StoringCompiler):
            self._temporary = PieceStore.temporary(self.compiler)
        return self._temporary

    def _compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> tuple[Piece, bytes]:
        if self.pieces is not None:
            return self.pieces.compiler.compile_and_store(piece, inputs)
        return self.compiler.compile(piece, inputs), b""

    def _take(self, group: Group) -> bool:
        """Put a stored body to use; whether there is one."""
        pieces = self._store_of(group)
        stored = read_body(pieces, group) if pieces is not None else None
        if pieces is None or stored is None:
            return False
        try:
            piece = pieces.compiler.load(stored.artifact)
        except Exception as exc:  # whatever a stored body raises, it is made anew
            drop_body(pieces, group, exc)
            return False
        self._use(group, piece, stored)
        return True

    def _use(self, group: Group, piece: Piece, stored: StoredBody) -> None:
        """Give a group's layers a body, for as many tokens as a trial finds it faster for."""
        body, verdict = stored.body, stored.verdict
        if verdict is None:
            verdict = self._try(group, body, piece)
            pieces = self._store_of(group)
            if pieces is not None and stored.artifact:
                keep_body(pieces, group, replace(stored, verdict=verdict))
        if verdict.tokens != 0:
            modules = {
                f"{name}.{path}".rstrip("."): module
                for name, layer in zip(group.names, group.layers, strict=True)
                for path, module in layer.named_modules()
            }
            watch = ReadWatch(modules, group.layers[0], body.reads)
            # Asked once it is watched: it may have changed since the group was made, while a job compiled.
            if group.changed or changed_global(body.globals) is not None:
                return
            limit = group.form.elements(group.sizes(verdict.tokens)) if verdict.tokens is not None else None
            bound = {id(layer): BoundBody(layer, piece, body.arguments, group.form, limit) for layer in group.layers}
            self.in_use = InUse((*self.in_use.groups, (group, watch)), {**self.in_use.every, **bound})
        self.report.insides.append(
            InsideReport(
                group.form.op, group.names, body.seconds, verdict.tokens, verdict.eager_us, verdict.compiled_us
            )
        )

    def _try(self, group: Group, body: Body, piece: Piece) -> Verdict:
        try:
            return try_body(group, body, piece, limited=group.device.type == "cpu")
        except Exception as exc:  # whatever a trial raises: the layers go on as they are
            logger.warning("glowplug: the compiled body of %s is not used: its trial raised %s", group.form.op, exc)
            return Verdict()
