"""The op bodies of a model: the compiled insides of opaque ops (experts, attention of several kernels), one for each
group of layers, used where they are faster.

On a CPU a job compiles them while the model already serves, and sequences that start later use them. Everything that a
body's trace read is watched; a body whose layers have changed does not run.
"""

from __future__ import annotations

import contextlib
import logging
import math
import pickle
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from glowplug.background.job import Job, orphaned
from glowplug.bodies.body import Body, BoundBody, InUse, Verdict
from glowplug.bodies.group import Group
from glowplug.bodies.make import make_body
from glowplug.bodies.trial import try_body
from glowplug.compilers import PieceCompiler
from glowplug.compilers.base import StoringCompiler
from glowplug.errors import CaptureError
from glowplug.layers.watch import ReadWatch
from glowplug.program import PieceStore
from glowplug.program.piece_store import Run
from glowplug.reasons import said
from glowplug.report import InsideReport, Report
from glowplug.runtime.forks import make_lock
from glowplug.store.address import changed_global

_STORED_AS = "inside"
"""What the store calls an op body."""
logger = logging.getLogger("glowplug")


class Bodies:
    """The op bodies of one model.

    Args:
        groups: the groups of layers that get a body.
        compiler: compiles the bodies.
        report: receives the results of trials.
        pieces: the user's store, if there is one.

    Attributes:
        in_use: the bodies for a sequence that begins now.
        job: the job that compiles bodies, if any.
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
        """Whether some bodies are still being compiled or still have to be tried."""
        return bool(self._groups)

    def compile_here(self) -> None:
        """Compile and try all bodies now."""
        groups, self._groups = self._groups, []
        for group in groups:
            if not self._take(group):
                with contextlib.suppress(CaptureError):
                    body, (piece, artifact) = make_body(group, self._compile)
                    self._use(group, replace(body, artifact=artifact), piece)

    def compile_for_others(self) -> None:
        """Compile the bodies that are missing in the user's store. A process with weights will try them."""
        groups, self._groups = self._groups, []
        if self.pieces is not None:
            self._compile_missing([group for group in groups if group.address is not None])

    def compile_in_background(self) -> None:
        """Use the stored bodies that were tried already, and start compiling the missing ones if a fork can do that."""
        waiting, missing = [], []
        for group in self._groups:
            body = self._read(group)
            if body is not None and body.verdict is None:
                waiting.append(group)
            elif body is None or not self._load(group, body):
                missing.append(group)
        compiler = self.compiler
        able = isinstance(compiler, StoringCompiler) and compiler.forks([])
        if missing and able and missing[0].device.type == "cpu" and self._store_of(missing[0]) is not None:
            waiting += missing
            self.job = Job.fork(lambda _: self._compile_missing(missing))
        self._groups = waiting

    def poll(self, deadline: float | None = None) -> None:
        """Once the job has ended, try and use its bodies. Waits for the job until `deadline` (`time.monotonic()`)."""
        wait = max(deadline - time.monotonic(), 0) if deadline is not None else 0
        if not self._lock.acquire(timeout=wait):
            return  # another thread is trying them; don't block this one
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

    # -- compiling and trying ---------------------------------------------------------------------------------

    def _compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> tuple[Run, bytes]:
        if self.pieces is not None:
            return self.pieces.compiler.compile_and_store(piece, inputs)
        return self.compiler.compile(piece, inputs), b""

    def _compile_missing(self, groups: Sequence[Group]) -> None:
        """Compile and store the bodies that no process has stored yet."""
        for group in groups:
            pieces = self._store_of(group)
            assert pieces is not None
            with contextlib.suppress(CaptureError), pieces.store.lock(_STORED_AS, _key(pieces, group)):
                if self._read(group) is None:
                    body, artifact = make_body(group, pieces.compiler.compile_to_bytes)
                    if not orphaned():
                        self._keep(group, replace(body, artifact=artifact))

    def _use(self, group: Group, body: Body, piece: Run) -> None:
        """Use a body for the layers of a group, for as many tokens as it is faster for in a trial."""
        verdict = body.verdict
        if verdict is None:
            verdict = self._try(group, body, piece)
            self._keep(group, replace(body, verdict=verdict))
        if verdict.tokens != 0:
            modules = {
                f"{name}.{path}".rstrip("."): module
                for name, layer in zip(group.names, group.layers, strict=True)
                for path, module in layer.named_modules()
            }
            watch = ReadWatch(modules, group.layers[0], body.reads)
            # Check after the watch began: the layers may have changed while a job compiled the body.
            if group.changed or changed_global(body.globals) is not None:
                return
            first, limit = group.form.arguments[0], verdict.tokens
            if limit is not None:
                limit = math.prod(first.shape(group.sizes(limit)))
            bound = {id(layer): BoundBody(layer, piece, body, group.form, limit) for layer in group.layers}
            self.in_use = InUse((*self.in_use.groups, (group, watch)), {**self.in_use.every, **bound})
        self.report.insides.append(InsideReport(group.form.op, group.names, body.seconds, *verdict))

    def _try(self, group: Group, body: Body, piece: Run) -> Verdict:
        try:
            return try_body(group, body, piece, limited=group.device.type == "cpu")
        except Exception as exc:  # whatever a trial raises, keep the layers' own code
            logger.warning(
                "glowplug: the compiled body of %s is not used: its trial raised %s", group.form.op, said(exc)
            )
            return Verdict()

    # -- in a store -------------------------------------------------------------------------------------------

    def _store_of(self, group: Group) -> PieceStore | None:
        """Where a group's body is stored: the user's store, or a temporary one through which jobs hand it over."""
        if self.pieces is not None and group.address is not None:
            return self.pieces
        if self._temporary is None and isinstance(self.compiler, StoringCompiler):
            self._temporary = PieceStore.temporary(self.compiler)
        return self._temporary

    def _read(self, group: Group) -> Body | None:
        """A group's stored body, unless global values that its trace read have changed."""
        pieces = self._store_of(group)
        payload = pieces.store.get(_STORED_AS, _key(pieces, group)) if pieces is not None else None
        try:
            body: Body | None = pickle.loads(payload) if payload is not None else None
            return body if body is not None and changed_global(body.globals) is None else None
        except Exception as exc:  # whatever a stored body raises, recompile it
            self._drop(group, exc)
            return None

    def _take(self, group: Group) -> bool:
        """Use a group's stored body; returns whether there is one."""
        body = self._read(group)
        return body is not None and self._load(group, body)

    def _load(self, group: Group, body: Body) -> bool:
        """Use a body that was stored; returns whether it can be loaded."""
        try:
            assert isinstance(self.compiler, StoringCompiler)
            piece = self.compiler.load(body.artifact)
        except Exception as exc:  # whatever a stored body raises, recompile it
            self._drop(group, exc)
            return False
        self._use(group, body, piece)
        return True

    def _keep(self, group: Group, body: Body) -> None:
        pieces = self._store_of(group)
        if pieces is not None and body.artifact:
            about = f"{group.form.op}, {type(group.layers[0]).__name__}"
            pieces.store.put(_STORED_AS, _key(pieces, group), pickle.dumps(body), about)

    def _drop(self, group: Group, exc: Exception) -> None:
        pieces = self._store_of(group)
        if pieces is not None:
            pieces.store.drop(_STORED_AS, _key(pieces, group), f"it can't be loaded: {said(exc)}")


def _key(pieces: PieceStore, group: Group) -> str:
    return pieces.key(group.address or f"{group.form.op} {group.names[0]}")
