"""One start of a decoder: from its first call to the program that serves it.

find in the store -> trace -> split -> fingerprint -> stamp -> compile -> bind -> check -> keep
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from glowplug.errors import AttributesReadError, NotStampableError
from glowplug.frontends.vllm.calls import MODEL, DecoderCall, argument, readers
from glowplug.frontends.vllm.check import OwnForward, compare
from glowplug.frontends.vllm.layers import SourceBinder, assign_layers, choose, locate, short_decoder
from glowplug.frontends.vllm.log import logger
from glowplug.frontends.vllm.pieces import DecoderCompiler, SplittingOps, get_compiler, uninitialised
from glowplug.frontends.vllm.private import vllm
from glowplug.frontends.vllm.ranks import agreement
from glowplug.frontends.vllm.stamped import Stamped
from glowplug.frontends.vllm.stored import Stored
from glowplug.graph.capture import Captured, GraphInput, capture, traced_files
from glowplug.graph.fingerprint import fingerprint
from glowplug.graph.sources import parse
from glowplug.graph.split import Piece, split
from glowplug.graph.stamp import reads, stamp
from glowplug.program import template as templates
from glowplug.program.compiling import compile_pieces
from glowplug.program.pieces import PieceCache
from glowplug.program.plan import Plan, outline_of
from glowplug.program.template import Template
from glowplug.reasons import why
from glowplug.runtime.collector import collector_paused
from glowplug.store.record import Place

FIRST_RUN = "first run"
"""The phase that vLLM's own start has, too, and that counts for no compilation."""


class LeftToVllmError(Exception):
    """A decoder is left to vLLM; the message has the reason, in one sentence."""


class Start:
    """One start of one decoder.

    Args:
        decoder: the decoder.
        call: its first call.

    Attributes:
        seconds: how long each phase took.
        outputs: what the program gave for its first call, where it has run that already.
    """

    def __init__(self, decoder: Any, call: DecoderCall) -> None:
        config = decoder.vllm_config
        self.seconds: dict[str, float] = {}
        self.outputs: Sequence[Any] | None = None
        self._decoder, self._call, self._config = decoder, call, config
        self._agree = agreement(config)
        self._ops = SplittingOps.of(config.compilation_config)
        self._compiler: DecoderCompiler = get_compiler(config, decoder._compile_prefix, self._ops)
        self._stored: Stored | None = None
        self._traced: tuple[set[str], frozenset[str]] | None = None
        self._own: OwnForward | None = None
        self._in_inference = torch.is_inference_mode_enabled()

    def run(self) -> Stamped:
        """What serves the decoder. Ranks that run it together agree.

        Raises:
            LeftToVllmError: nothing does; the message has the reason.
        """
        reason: str | None = None
        for from_store in (True, False):
            with vllm().monitor_torch_compile(self._config), collector_paused():
                candidate, any_stored = self._agreed(self._candidate(from_store))
            reason, returns = self._compare(candidate)
            if reason is None:
                with self._phase("keep"):
                    self._keep(candidate)
                return replace(candidate, returns=returns)
            if self._stored is not None and candidate.stored:
                self._stored.drop(reason)
            if not any_stored:
                break
        raise LeftToVllmError(f"the stamped program is not equal to its own forward: {reason}")

    def _agreed(self, candidate: Stamped | str) -> tuple[Stamped, bool]:
        """The candidate of this rank, and whether that of any rank was stored, if each rank has one."""
        reason = candidate if isinstance(candidate, str) else None
        reason = self._agree(reason) if self._agree is not None else reason
        if reason is not None or isinstance(candidate, str):
            raise LeftToVllmError(str(reason))
        if self._agree is None:
            return candidate, candidate.stored
        return candidate, self._agree("stored" if candidate.stored else None) is not None

    def _compare(self, candidate: Stamped) -> tuple[str | None, Any]:
        """Why a program must not serve, or None; and the structure of what it returns."""
        compilation = self._config.compilation_config
        is_piecewise = compilation.mode == vllm().CompilationMode.VLLM_COMPILE
        try:
            if is_piecewise:
                with vllm().monitor_profiling_run(), self._phase(FIRST_RUN):
                    self._tune(candidate)
            with self._phase("check"):
                own = self._own or OwnForward.of(self._decoder, self._call, self._ops)
                compared = compare(self._decoder, own, self._call.tokens, self._ops, candidate, self._agree)
        except Exception as exc:  # whatever a program does, vLLM can compile without it
            logger().debug("glowplug: the program failed", exc_info=True)
            return f"it raises {why(exc)}", None
        if is_piecewise:
            compilation.compilation_time += self.seconds["check"]
        return compared

    def _run_own(self) -> None:
        """Run the decoder's own forward, to compare with it later. If it fails, it is run again then."""
        try:
            with torch.inference_mode(self._in_inference):
                self._own = self._own or OwnForward.of(self._decoder, self._call, self._ops)
        except Exception:
            logger().debug("glowplug: the decoder's own forward failed", exc_info=True)

    def _tune(self, candidate: Stamped) -> None:
        """Run the program on the whole dummy batch, on which Triton tunes the kernels that it has not tuned before."""
        program = candidate.write(self._decoder)
        self.outputs = program.run(*[read(self._call.tensors) for read in readers(program.arguments, self._decoder)])
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # so that no later phase counts its time

    def _candidate(self, from_store: bool) -> Stamped | str:
        """A program that serves once it was compared; or why there is none."""
        try:
            return self._find_or_make(from_store)
        except NotStampableError as exc:
            return f"its layers can't be stamped: {exc}"
        except Exception as exc:  # vLLM can compile without glowplug
            logger().debug("glowplug: the start failed", exc_info=True)
            return why(exc)

    def _find_or_make(self, from_store: bool) -> Stamped | str:
        read: set[str] = set()
        while True:
            with self._phase("kinds"):
                template = choose(self._decoder, read)
            if isinstance(template, str):
                return template
            if not read:
                with self._phase("load"):
                    self._stored = Stored.of(self._decoder, self._call, template, self._compiler, self._ops)
                    stamped = self._stored.find() if self._stored is not None and from_store else None
                if stamped is not None:
                    return stamped
            try:
                return self._make(template)
            except AttributesReadError as exc:
                read |= exc.places

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    # -- make -------------------------------------------------------------------------------------------------

    def _make(self, template: Template) -> Stamped:
        """Trace the template, stamp it over all layers, and compile its distinct pieces."""
        read: set[str] = set()
        begin = time.perf_counter()

        def consume(captured: Captured) -> Stamped:
            self.seconds["trace"] = self.seconds.get("trace", 0.0) + time.perf_counter() - begin
            templates.check_reads(self._decoder, template, read)
            with self._phase("stamp"):
                plan, binder, outside, distinct = self._stamp(captured, template)
            with self._phase("compile"):
                cache = PieceCache(store=self._stored.records.pieces if self._stored is not None else None)
                # Ranks run their decoder's collectives together, and may compile different pieces.
                meanwhile = self._run_own if self._agree is None else None
                slots = compile_pieces(distinct, self._compiler, cache, captured, None, meanwhile)
            self._traced = read, traced_files()
            graphs = {slot: piece.gm.forward for slot, piece in distinct.items()}
            ops = frozenset(slot for slot, piece in distinct.items() if self._ops.is_in(piece.gm))
            compiled = f"compiled {len(slots) - len(ops)} pieces{' at once' if self._compiler.forked else ''}"
            how = f"traced {template.length} of {len(binder.layers)} layers, {compiled}"
            allocated = {slot: uninitialised(piece.gm) for slot, piece in distinct.items()}
            return Stamped(plan, slots, lambda: graphs, binder, outside, ops, allocated, how)

        shapes = self._config.compilation_config.dynamic_shapes_config
        with (
            vllm().set_current_vllm_config(self._config),
            torch._inductor.config.patch(assume_32bit_indexing=shapes.assume_32_bit_indexing),
        ):
            return capture(
                self._call.function(),
                (short_decoder(self._decoder, template), self._call.examples()),
                consume,
                read,
                handle=vllm().LayerName,
                specialise=shapes.type != vllm().DynamicShapesType.BACKED_SIZE_OBLIVIOUS,
            )

    def _stamp(
        self, captured: Captured, template: Template
    ) -> tuple[Plan, SourceBinder, dict[str, Place | None], dict[Any, Piece]]:
        """Cut the template's graph at its splitting ops, and stamp its steps over all layers.

        Returns:
            The plan, what binds it, the places of what lies outside the layers, and the distinct pieces.
        """
        stack = template.stack
        arguments = {entry.node: entry.source for entry in captured.inputs if _is_argument(entry)}
        captured, locations, names = locate(stack, captured, arguments)
        bound = [e for e in captured.inputs if e.node not in arguments and e.type != "symint"]
        steps, outputs = split(captured, {entry.node for entry in bound}, cuts=self._ops.cuts)
        steps = assign_layers(steps, lambda piece: self._ops.is_in(piece.gm), locations)
        used = {name for step in steps for name in reads(step)} | set(outputs)
        arguments = {name: source for name, source in arguments.items() if name in used}
        pieces = [step for step in steps if isinstance(step, Piece)]
        prints = [fingerprint(piece.gm) for piece in pieces]
        stamped = stamp(
            captured, steps, prints, outputs, locations=locations, template=template.kinds, kinds=stack.kinds
        )
        head, sources = len(stamped.head), {entry.node: entry.source for entry in captured.inputs}
        outline = outline_of(steps[:head], prints[:head], sources)
        plan = Plan(tuple(steps[:head]), tuple(prints[:head]), outputs, arguments, stamped, outline)
        wanted = plan.values()
        outside: dict[str, Place | None] = {e.node: _place(e) for e in bound if e.node in wanted}
        binder = SourceBinder(stack.path, stack.layers, names, vllm().LayerName)
        return plan, binder, outside, dict(zip(prints, pieces, strict=True))

    def _keep(self, candidate: Stamped) -> None:
        """Store a program that was traced here."""
        if self._stored is not None and self._traced is not None and not candidate.stored:
            self._stored.keep(candidate, *self._traced)


def _is_argument(entry: GraphInput) -> bool:
    """Whether an input is read anew at each call: a tensor of the call, a size, or an object outside the decoder."""
    if entry.type == "handle":
        return False
    if argument(entry.source) is not None:
        return True
    source = parse(entry.source)
    if source is None:
        raise NotStampableError(f"the trace reads {entry.source}, which glowplug can't follow")
    return source.is_global or source.root != MODEL or source.size is not None


def _place(entry: GraphInput) -> Place:
    return Place(entry.value.value, is_handle=True) if entry.type == "handle" else Place(entry.source)
