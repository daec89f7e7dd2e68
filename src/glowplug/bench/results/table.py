"""Records as text: a line for each as it arrives, and a rich table at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.markup import escape
from rich.table import Table

from glowplug.bench.results.record import Record

NONE = "-"


def record_line(record: Record) -> str:
    """One finished measurement on one line."""
    head = f"{record['model']} depth {record['depth']} {record['strategy']}"
    if record["error"] is not None:
        return f"{head}: failed: {record['error']}"
    parts = [f"cold start {seconds(record['cold_start_s'])} s"]
    if record["pieces"] is not None:
        parts.append(f"{record['distinct_pieces']} of {record['pieces']} pieces distinct")
    if record["gpu"] is not None:
        parts.append(f"a token {_gpu(record, 'static_ms', '.2f')} ms over a static cache")
    else:
        parts.append(f"decode {record['steady_ms']['decode']:.2f} ms")
    parts.append(f"error {record['max_rel_err']:.0e}")
    parts += [f"note: {note}" for note in _notes(record)]
    return f"{head}: {', '.join(parts)}"


def results_table(records: Sequence[Record]) -> Table:
    """All records, all of one device. The ratio is a strategy's cold start over hoisted's at the same model, depth and
    width."""
    first = records[0]
    columns = _GPU if first["device"] == "cuda" else _CPU
    table = Table(title=f"{escape(first['model'])}, width {first['width']}, {first['device']} {first['dtype']}")
    for name in columns:
        table.add_column(name, justify="left" if name in ("strategy", "experts") else "right")
    noted = any(map(_notes, records))
    if noted:
        table.add_column("note", overflow="fold", max_width=60)
    before = None
    for record in records:
        if before is not None and record["depth"] != before:
            table.add_section()
        before = record["depth"]
        cells = [cell(record, records) for cell in columns.values()]
        table.add_row(*cells, *([escape("; ".join(_notes(record)))] if noted else []))
    return table


def hoisted_cold_start(records: Sequence[Record], record: Record) -> float | None:
    """The cold start of `hoisted` at the model, depth and width of a record, in seconds."""
    for other in records:
        same = all(other[key] == record[key] for key in ("model", "depth", "width", "device", "dtype"))
        if same and other["strategy"] == "hoisted":
            cold: float | None = other["cold_start_s"]
            return cold
    return None


def _notes(record: Record) -> list[str]:
    """Why a record failed, what ran otherwise than asked, and which figures of a GPU could not be measured."""
    notes = [] if record["error"] is None else [f"failed: {record['error']}"]
    missing = [f"{name}: {value}" for name, value in (record["gpu"] or {}).items() if isinstance(value, str)]
    return notes + list(record["fallback"]) + missing


def _ratio(record: Record, records: Sequence[Record]) -> str:
    cold, hoisted = record["cold_start_s"], hoisted_cold_start(records, record)
    return _number(cold / hoisted if cold is not None and hoisted else None, ".2f")


def _pieces(record: Record) -> str:
    return NONE if record["pieces"] is None else f"{record['distinct_pieces']}/{record['pieces']}"


def _gpu(record: Record, name: str, form: str, part: str | None = None, scale: float = 1.0) -> str:
    """A figure of a GPU, or a part of it."""
    value = (record["gpu"] or {}).get(name)
    if isinstance(value, dict) and part is not None:
        value = value[part]
    return NONE if value is None or isinstance(value, str) else format(value / scale, form)


def seconds(value: float) -> str:
    """A time in seconds, with milliseconds below one second."""
    return format(value, ".2f" if value >= 1 else ".3f")


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


_Cell = Callable[[Record, Sequence[Record]], str]

_START: dict[str, _Cell] = {
    "depth": lambda record, _: str(record["depth"]),
    "strategy": lambda record, _: record["strategy"],
    "experts": lambda record, _: record["experts"],
    "cold start\ns": lambda record, _: NONE if record["cold_start_s"] is None else seconds(record["cold_start_s"]),
}
"""Column -> its cell for a record among all records."""

_CPU: dict[str, _Cell] = {
    **_START,
    "cold /\nhoisted": _ratio,
    "pieces\ndistinct/all": lambda record, _: _pieces(record),
    "decode\nms": lambda record, _: _number(record["steady_ms"]["decode"], ".2f"),
    "prefill 128\nms": lambda record, _: _number(record["steady_ms"]["prefill128"], ".2f"),
    "peak\nMiB": lambda record, _: _number(record["peak_rss_mb"], ".0f"),
    "largest\nrel. error": lambda record, _: _number(record["max_rel_err"], ".0e"),
}

_GPU: dict[str, _Cell] = {
    **_START,
    "ready\ns": lambda record, _: _gpu(record, "ready_s", ".2f"),
    "pieces\ndistinct/all": lambda record, _: _pieces(record),
    "ms a step\nstatic": lambda record, _: _gpu(record, "step_ms", ".2f"),
    "ms a token\nstatic": lambda record, _: _gpu(record, "static_ms", ".2f"),
    "ms a token\ndefault cache": lambda record, _: _gpu(record, "dynamic_ms", ".2f"),
    "tokens/s\nat 16": lambda record, _: _gpu(record, "static_tokens_s_16", ".0f"),
    "kernels\na layer": lambda record, _: _gpu(record, "launches", ".1f", "kernels_a_layer"),
    "launches\na step": lambda record, _: _gpu(record, "launches", ".0f", "host_launches"),
    "graphs\nMiB": lambda record, _: _gpu(record, "graphs", ".0f", "bytes", 2**20),
    "peak\nMiB": lambda record, _: _number(record["cuda_peak_mb"], ".0f"),
}
