"""What glowplug did to a model: strategy, pieces, seconds of each phase, and every step down the ladder."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from glowplug.errors import UsageError
from glowplug.reasons import counted, one_line
from glowplug.runtime.forks import make_lock

logger = logging.getLogger("glowplug")

_STEPS_DOWN = {
    "eager": "this call runs eager (strict=True raises instead)",
    "hoisted": "every layer is traced, so the start takes longer",
    "op": "ops run uncompiled, with the same results",
    "launches": "kernels are launched one by one, with the same results",
}
PHASES = ("load", "trace", "split", "fingerprint", "stamp", "compile", "bind", "verify", "store")


@dataclass(frozen=True)
class Fallback:
    """One step down the ladder: stamped -> hoisted (a full trace) -> eager.

    Attributes:
        reason: what could not be served, and why.
        layers: qualified names of the layers that caused it; empty if it concerns the whole call.
        to: what ran instead: `"eager"`, `"hoisted"`, `"op"` (the uncompiled code of opaque ops), or `"launches"` (the
            same kernels, without a CUDA graph).
    """

    reason: str
    layers: tuple[str, ...] = ()
    to: str = "eager"

    @property
    def where(self) -> str:
        """The first of the layers, in parentheses; empty if there are none."""
        more = ", ..." if len(self.layers) > 3 else ""
        return f" ({', '.join(self.layers[:3])}{more})" if self.layers else ""


@dataclass(frozen=True)
class InsideReport:
    """The compiled op body of one group of opaque experts or attention layers.

    Attributes:
        op: the op that calls the layers.
        layers: their qualified names.
        seconds: seconds to capture and compile it.
        tokens: the most tokens of a step for which it runs; 0: never, as the layers' own forward is faster; None: any.
        eager_us: measured microseconds of a layer's own forward for one token.
        compiled_us: the same for the compiled body.
    """

    op: str
    layers: tuple[str, ...]
    seconds: float
    tokens: int | None
    eager_us: float
    compiled_us: float


@dataclass
class ElsewhereReport:
    """A background build: another process builds the program while this one serves eagerly or loads weights.

    Attributes:
        seconds: how long the build took; None while it is running.
        eager_calls: calls that ran eager in the meantime.
        load_seconds: how long this process loaded the weights.
        waited_seconds: how long this process then waited for the build.
        reason: why the build failed; None if it did not.
    """

    seconds: float | None = None
    eager_calls: int = 0
    load_seconds: float = 0.0
    waited_seconds: float = 0.0
    reason: str | None = None

    @property
    def hidden_seconds(self) -> float:
        """Seconds of the build for which this process did not wait."""
        return max((self.seconds or 0.0) - self.waited_seconds, 0.0)

    def __str__(self) -> str:
        if self.seconds is None:
            return f"being built in another process; {self.eager_calls} calls served eager"
        text = f"built in another process in {self.seconds:.2f} s, {self.hidden_seconds:.2f} s of it hidden"
        if self.load_seconds:
            text += f" behind {self.load_seconds:.2f} s of loading weights"
        if self.eager_calls:
            text += f" behind {self.eager_calls} calls served eager"
        return text if self.reason is None else f"{text}; it came to nothing: {self.reason}"


@dataclass
class CudaGraphsReport:
    """The CUDA graphs of a model.

    Attributes:
        count: how many were recorded.
        seconds: seconds that recording took.
        bytes: bytes of device memory that they took when the last was recorded.
    """

    count: int = 0
    seconds: float = 0.0
    bytes: int = 0

    def add(self, seconds: float, size: int) -> None:
        """Count one more, after which all together take `size` bytes."""
        self.count, self.seconds, self.bytes = self.count + 1, self.seconds + seconds, size

    def __str__(self) -> str:
        return f"{self.count} CUDA graphs, recorded in {self.seconds:.2f} s, {self.bytes >> 20} MiB"


@dataclass(frozen=True)
class StoreReport:
    """What the artifact store did for a model.

    Attributes:
        place: the store's folder or URL.
        counts: how many pieces, programs and op bodies were found, missed and stored.
        problems: sentences on what went wrong with it; no problem stops the start.
    """

    place: str
    counts: dict[str, int]
    problems: tuple[str, ...]

    @classmethod
    def of(cls, store: Any) -> StoreReport:
        """The report on a store."""
        return cls(store.place, dict(store.counts), tuple(store.problems))


@dataclass
class Report:
    """What happened to one model. `glowplug.report(model)` returns it; it grows as the model is used.

    Attributes:
        strategy: `"stamped"`, `"hoisted"`, `"ordered"` or `"baked"`; `"eager"` if nothing could be compiled.
        experts: `"inline"`, `"opaque"` or `"none"` (the model has no experts that glowplug recognises).
        attention: where the graph of a transformers model is cut. `"cut"`: at the attention function, so that the
            projections around it are compiled. `"whole"`: at the attention module, which runs uncompiled because it
            uses its mask or cache in a way of its own.
        compiler: the piece compiler's name.
        pieces: the number of pieces of all programs.
        distinct_pieces: how many of them are distinct; each is compiled once.
        compiled_pieces: how many of those this process or its forks compiled; the others came from a store.
        pending_pieces: deferred pieces that still run uncompiled.
        start: `"cold"` if the model was traced, `"warm"` if its program came from the store.
        store: what the store did; None without one.
        elsewhere: a background build; None if there was none.
        phases: seconds spent, by phase: load (from the store), trace, split, fingerprint, stamp, compile, bind, verify,
            store.
        fallbacks: each step down the ladder, once, with its reason.
        serving: what served the latest call: `"program"`, or `"eager: REASON"`; `"nothing yet"` before the first.
        template_layers: how many layers of a stamped model were traced; 0 if it was not stamped.
        programs: how many programs were built: one for each signature of inputs, normally one.
        insides: the compiled op bodies of opaque experts and attention.
        cuda_graphs: those of its decode steps.
        outlines: the steps of each program, for `glowplug.explain`.
        sources: the Python text of each program.
    """

    strategy: str = "eager"
    experts: str = "none"
    attention: str = "cut"
    compiler: str = "inductor"
    pieces: int = 0
    distinct_pieces: int = 0
    pending_pieces: int = 0
    compiled_pieces: int = 0
    start: str = "cold"
    store: StoreReport | None = None
    elsewhere: ElsewhereReport | None = None
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    fallbacks: list[Fallback] = field(default_factory=list)
    serving: str = "nothing yet"
    programs: int = 0
    template_layers: int = 0
    insides: list[InsideReport] = field(default_factory=list)
    cuda_graphs: CudaGraphsReport = field(default_factory=CudaGraphsReport)
    outlines: list[Any] = field(default_factory=list, repr=False, compare=False)
    sources: list[str] = field(default_factory=list, repr=False, compare=False)
    _lock: Any = field(default_factory=make_lock, repr=False, compare=False)

    @contextmanager
    def phase(self, name: str, apart: Sequence[str] = ()) -> Iterator[None]:
        """Add the time spent in the block to a phase, without the time that the block adds to the phases `apart`."""
        start, others = time.perf_counter(), sum(self.phases[other] for other in apart)
        try:
            yield
        finally:
            others = sum(self.phases[other] for other in apart) - others
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start - others

    def fall_back(self, reason: str, layers: tuple[str, ...] = (), to: str = "eager") -> None:
        """Record, once, a step down the ladder, and log it once."""
        fallback = Fallback(one_line(reason), layers, to)
        with self._lock:
            if fallback in self.fallbacks:
                return
            self.fallbacks.append(fallback)
        logger.warning("glowplug: %s: %s%s", _STEPS_DOWN[to], fallback.reason, fallback.where)

    def add_stored_program(self, program: Any, facts: Mapping[str, Any], distinct: int) -> None:
        """Record a program that came from the store."""
        self.start, self.strategy, self.experts = "warm", facts["strategy"], facts["experts"]
        self.attention, self.template_layers = facts["attention"], facts["template_layers"]
        self.pieces += sum(step.fingerprint is not None for step in program.outline)
        self.distinct_pieces = distinct
        self.programs += 1
        self.outlines.append(program.outline)
        self.sources.append(program.listing())

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        elsewhere = None
        if self.elsewhere is not None:
            elsewhere = {**asdict(self.elsewhere), "hidden_seconds": round(self.elsewhere.hidden_seconds, 4)}
        return {
            "strategy": self.strategy,
            "experts": self.experts,
            "attention": self.attention,
            "compiler": self.compiler,
            "pieces": self.pieces,
            "distinct_pieces": self.distinct_pieces,
            "pending_pieces": self.pending_pieces,
            "compiled_pieces": self.compiled_pieces,
            "start": self.start,
            "elsewhere": elsewhere,
            "store": asdict(self.store) if self.store is not None else None,
            "serving": self.serving,
            "programs": self.programs,
            "template_layers": self.template_layers,
            "phases": {name: round(seconds, 4) for name, seconds in self.phases.items()},
            "insides": [{**asdict(inside), "layers": len(inside.layers)} for inside in self.insides],
            "cuda_graphs": asdict(self.cuda_graphs),
            "fallbacks": [{**asdict(fallback), "layers": list(fallback.layers)} for fallback in self.fallbacks],
        }

    def save(self, folder: str | Path) -> Path:
        """Write the report and the programs into a folder: `report.json`, and `program.py`, `program_2.py`, ...

        Creates the folder if it is missing.

        Raises:
            UsageError: a file can't be written.
        """
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "report.json").write_text(json.dumps(self.as_dict(), indent=2) + "\n")
            for number, source in enumerate(self.sources, start=1):
                (path / ("program.py" if number == 1 else f"program_{number}.py")).write_text(source)
        except OSError as exc:
            raise UsageError(f"can't write the report to {path}: {exc.strerror or exc}") from exc
        return path

    def __str__(self) -> str:
        shown = {name: s for name, s in self.phases.items() if s or name not in ("load", "store")}
        phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in shown.items())
        lines = [
            f"strategy {self.strategy}, experts {self.experts}, compiler {self.compiler}"
            + (", attention whole" if self.attention == "whole" else ""),
            f"{counted(self.pieces, 'piece')}, {self.distinct_pieces} distinct"
            + (f"; {self.pending_pieces} of them are still being compiled" if self.pending_pieces else ""),
            phases,
        ]
        if self.elsewhere is not None:
            lines.append(str(self.elsewhere))
        if self.store is not None:
            counts = ", ".join(f"{count} {what}" for what, count in sorted(self.store.counts.items()) if count)
            lines.append(f"{self.start} start; store {self.store.place}: {counts or 'unused'}")
            lines += [f"store: {problem}" for problem in self.store.problems]
        for inside in self.insides:
            used = {0: "not used", None: "used"}.get(inside.tokens, f"used up to {inside.tokens} tokens")
            times = f"{inside.compiled_us:.0f} us, eager {inside.eager_us:.0f} us"
            lines.append(f"inside of {inside.op} ({counted(len(inside.layers), 'layer')}): {times}; {used}")
        if self.cuda_graphs.count:
            lines.append(str(self.cuda_graphs))
        lines += [f"{fallback.to}: {fallback.reason}" for fallback in self.fallbacks]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The report in a notebook, with the steps of each layer as coloured blocks."""
        from glowplug.show.html import report_html

        return report_html(self)
