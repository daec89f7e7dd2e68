"""Compiles the inside of layer ops, once for all layers of a kind, and uses it where it is faster.

An op keeps what it does out of the graph, and so uncompiled. The inside of opaque experts, and of attention that is
several kernels, is captured from one layer of each kind (experts with the implementation that compiles best on the
device) and bound to the weights of the others. On a CPU it is compiled in a fork, while the model serves already; it
takes over when a sequence begins. What its trace read is watched; an inside whose layers changed is not run.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from glowplug.background.job import Job, Say, orphaned
from glowplug.compilers import PieceCompiler
from glowplug.compilers.base import StoringCompiler
from glowplug.errors import CaptureError
from glowplug.forks import make_lock
from glowplug.graph.capture import Captured, capture
from glowplug.graph.split import Piece, split
from glowplug.hf.inside_store import inside_key, keep_inside, load_inside
from glowplug.hf.kinds import Kind, Made
from glowplug.hf.manifests import changed_global, globals_of
from glowplug.hf.shadow import Shadow
from glowplug.hf.trials import Verdict, judge
from glowplug.layers.watch import ReadWatch
from glowplug.ops.inside import Inside
from glowplug.program import PieceStore
from glowplug.reasons import named
from glowplug.report import InsideReport, Report

IMPLEMENTATION = {"cpu": "batched_mm", "cuda": "grouped_mm"}
"""The experts implementation whose inside is worth compiling. On a CPU a compiled `batched_mm` took half the time of
`grouped_mm`, at one token; on an H200 a compiled `grouped_mm` three fifths, for gpt-oss-120b."""

_WAIT_S = 600.0
logger = logging.getLogger("glowplug")


@dataclass(frozen=True)
class Installed:
    """The inside of the layers of a kind.

    Attributes:
        kind: the kind.
        insides: id of a layer -> its inside.
        watch: finds changes of what the inside's trace read.
    """

    kind: Kind
    insides: Mapping[int, Inside]
    watch: ReadWatch


@dataclass(frozen=True)
class InUse:
    """The insides that a sequence runs.

    Attributes:
        kinds: of each kind.
        every: all of them together: id of a layer -> its inside.
    """

    kinds: tuple[Installed, ...] = ()
    every: Mapping[int, Inside] = field(default_factory=dict)

    def and_further(self, one: Installed) -> InUse:
        """These and those of one more kind."""
        return InUse((*self.kinds, one), {**self.every, **one.insides})

    def unchanged(self, report: Report) -> Mapping[int, Inside]:
        """Those of kinds whose layers still are what the inside was made from."""
        changes = [(one, one.watch.change()) for one in self.kinds]
        if all(change is None for _, change in changes):
            return self.every
        for one, change in changes:
            if change is not None:
                what = f"the compiled inside of {one.kind.op} is not used, as {change} after it was compiled"
                report.fall_back(what, one.kind.names, to="op")
        return {key: inside for one, change in changes if change is None for key, inside in one.insides.items()}


class Insides:
    """The insides of one model.

    Args:
        model: the model.
        kinds: what they are to be made for.
        compiler: compiles them.
        report: receives what was found.
        pieces: where insides are kept, if anywhere.
    """

    def __init__(
        self,
        model: nn.Module,
        kinds: Sequence[Kind],
        compiler: PieceCompiler,
        report: Report,
        pieces: PieceStore | None = None,
    ) -> None:
        self.pieces = pieces
        self._temporary: PieceStore | None = None
        self.model = model
        self.compiler = compiler
        self.report = report
        self.device = next(model.parameters()).device
        self.kinds = list(kinds)
        self._keys: dict[tuple[str, ...], str] = {}
        self._unjudged: list[tuple[Kind, Made]] = []
        self.job: Job | None = None
        self.in_use = InUse()
        self._lock = make_lock()

    @property
    def pending(self) -> bool:
        """Whether insides are being compiled elsewhere."""
        return bool(self._unjudged) or self.job is not None

    def compile_here(self) -> None:
        """Compile and judge them all, now."""
        self._take_stored()
        for kind in self.kinds:
            with contextlib.suppress(CaptureError):
                self._install(kind, self._make(kind, self._compile))
        self._judge_stored()

    def _compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> tuple[Any, bytes | None]:
        if self.pieces is not None:
            return self.pieces.compiler.compile_and_store(piece, inputs)
        return self.compiler.compile(piece, inputs), None

    def compile_unjudged(self) -> None:
        """Compile those that are not in the store, for a process that has weights to try them with."""
        pieces = self.pieces
        if pieces is None:
            return
        for kind in self.kinds:
            key = inside_key(pieces, kind, IMPLEMENTATION.get(self.device.type))
            if key is not None and pieces.store.get("inside", key) is None:
                with contextlib.suppress(CaptureError), pieces.store.lock("inside", key, _WAIT_S):
                    made = self._make(kind, self._compile)
                    keep_inside(pieces, key, kind, replace(made, run=None), None)

    def _take_stored(self) -> None:
        """Put to use those that are in the store, and forget about them."""
        pieces = self.pieces
        if pieces is None:
            return
        left = []
        for kind in self.kinds:
            key = inside_key(pieces, kind, IMPLEMENTATION.get(self.device.type))
            stored = load_inside(pieces, key) if key is not None else None
            if key is not None:
                self._keys[kind.names] = key
            if stored is None or changed_global(stored[0].globals) is not None:
                left.append(kind)
            elif stored[1] is None:
                self._unjudged.append((kind, stored[0]))
            else:
                self._use(kind, stored[0], stored[1])
        self.kinds = left

    def compile_beside(self) -> None:
        """Begin to compile them in a fork, if the compiler's pieces can be made in one."""
        self._take_stored()
        compiler = self.compiler
        if not self.kinds or self.device.type != "cpu" or not isinstance(compiler, StoringCompiler):
            return
        if not compiler.forks([]):
            return

        def to_bytes(piece: fx.GraphModule, inputs: Sequence[Any]) -> tuple[None, bytes]:
            return None, compiler.compile_to_bytes(piece, inputs)

        self._temporary = PieceStore.temporary(compiler)
        places = [self._place(kind) for kind in self.kinds]

        def work(_: Say) -> None:
            for kind, place in zip(self.kinds, places, strict=True):
                if place is None:
                    continue
                pieces, key = place
                with contextlib.suppress(CaptureError), pieces.store.lock("inside", key, _WAIT_S):
                    made = self._make(kind, to_bytes) if pieces.store.get("inside", key) is None else None
                    if made is not None and not orphaned():
                        keep_inside(pieces, key, kind, made, None)

        self.job = Job.fork(work)

    def poll(self, deadline: float | None = None) -> None:
        """Put compiled insides to use once the fork has ended.

        Args:
            deadline: wait for it until then (`time.monotonic()`); None: don't wait.
        """
        wait = max(deadline - time.monotonic(), 0) if deadline is not None else 0
        if not self._lock.acquire(timeout=wait):
            return  # another thread tries them; serving goes on
        try:
            self._judge_stored()
            if self.job is not None and not self.job.ours:
                self.job = None
                self.compile_beside()
            if self.job is not None and self.job.ended(deadline):
                self.job = None
                for kind in self.kinds:
                    self._take(kind)
        finally:
            self._lock.release()

    def _judge_stored(self) -> None:
        while self._unjudged:
            self._install(*self._unjudged.pop())

    def _place(self, kind: Kind) -> tuple[PieceStore, str] | None:
        """Where a job leaves the inside of a kind: the store, or else a temporary one."""
        key = self._keys.get(kind.names)
        if self.pieces is not None and key is not None:
            return self.pieces, key
        key = hashlib.sha256(repr((kind.op, kind.names)).encode()).hexdigest()
        return (self._temporary, key) if self._temporary is not None else None

    def _take(self, kind: Kind) -> None:
        """Use what a job has left; without, the layers go on as they are."""
        place = self._place(kind)
        stored = load_inside(*place) if place is not None else None
        if stored is not None and stored[1] is not None:
            self._use(kind, stored[0], stored[1])
        elif stored is not None:
            self._install(kind, stored[0])

    def _make(self, kind: Kind, compile: Callable[..., Any]) -> Made:
        """Capture and compile the inside of a kind's first layer."""
        start = time.perf_counter()
        layer = kind.layers[0]
        device = next(layer.parameters()).device
        examples = kind.examples(device)

        def consume(captured: Captured) -> tuple[Any, tuple[str, ...]]:
            piece, order = _only_piece(captured, layer)
            inputs = [node.meta["example_value"] for node in piece.gm.graph.nodes if node.op == "placeholder"]
            done = compile(piece.gm, inputs)
            kind.check(captured)
            return done, order

        shadow = Shadow(layer)
        shadow.put_in_force(experts=IMPLEMENTATION.get(device.type))
        reads: set[str] = set()
        (run, artifact), order = capture(kind.function(), (shadow.root, *examples), consume, reads)
        return Made(run, order, time.perf_counter() - start, artifact, tuple(sorted(reads)), globals_of(reads))

    def _install(self, kind: Kind, made: Made) -> None:
        """Give a kind's layers their inside, for as many tokens as a trial finds it faster for."""
        try:
            verdict = judge(kind, made, limited=self.device.type == "cpu")
        except Exception as exc:  # whatever a trial raises: the layers go on as they are
            logger.warning("glowplug: the compiled inside of %s is not used: its trial raised %s", kind.op, exc)
            verdict = Verdict(0, math.nan, math.nan)
        self._use(kind, made, verdict)
        key = self._keys.get(kind.names)
        if self.pieces is not None and key is not None and made.artifact is not None:
            keep_inside(self.pieces, key, kind, replace(made, run=None), verdict)

    def _use(self, kind: Kind, made: Made, verdict: Verdict) -> None:
        if verdict.tokens != 0:
            modules = {
                f"{name}.{path}".rstrip("."): module
                for name, layer in zip(kind.names, kind.layers, strict=True)
                for path, module in layer.named_modules()
            }
            watch = ReadWatch(modules, kind.layers[0], made.reads)
            # Asked once it is watched: it may have changed since the kind was told, while a fork compiled.
            if kind.changed or changed_global(made.globals) is not None:
                return
            insides = {id(layer): kind.bind(made, layer, verdict.tokens) for layer in kind.layers}
            self.in_use = self.in_use.and_further(Installed(kind, insides, watch))
        self.report.insides.append(
            InsideReport(kind.op, kind.names, made.seconds, verdict.tokens, verdict.eager_us, verdict.compiled_us)
        )


def _only_piece(captured: Captured, layer: nn.Module) -> tuple[Piece, tuple[str, ...]]:
    """The one piece that an inside consists of, and where its inputs come from, as `Inside` wants it.

    Raises:
        CaptureError: it is more than one piece, or reads something that is not a weight of the layer.
    """
    changing = {entry.node for entry in captured.inputs if entry.source.startswith("L['a")}
    fixed = {entry.node for entry in captured.inputs} - changing
    steps, outputs = split(captured, fixed)
    if len(steps) != 1 or not isinstance(steps[0], Piece) or steps[0].outputs != outputs or len(outputs) != 1:
        raise CaptureError("the inside is not one piece with one output")
    paths = {id(tensor): name for name, tensor in (*layer.named_parameters(), *layer.named_buffers())}
    sources = {entry.node: entry for entry in captured.inputs}
    order = []
    for name in steps[0].inputs:
        entry = sources.get(name)
        if entry is None:
            raise CaptureError(f"the inside reads {name}, which is no input")
        if name in changing:
            order.append(entry.source.replace("L['", "").replace("']", "", 1).replace(".size()", ".shape"))
        elif id(entry.value) in paths:
            order.append(f"@{paths[id(entry.value)]}")
        else:
            raise CaptureError(f"the inside reads {named(entry.source)}, which is no weight of the layer")
    return steps[0], tuple(order)
