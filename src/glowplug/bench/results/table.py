"""Records as text: a line for each as it arrives, and a rich table at the end."""

from __future__ import annotations

from collections.abc import Sequence

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
    parts.append(f"decode {record['steady_ms']['decode']:.2f} ms")
    parts.append(f"error {record['max_rel_err']:.0e}")
    parts += [f"note: {reason}" for reason in record["fallback"]]
    return f"{head}: {', '.join(parts)}"


def results_table(records: Sequence[Record]) -> Table:
    """All records. The ratio is a strategy's cold start over hoisted's at the same model, depth and width."""
    first = records[0]
    table = Table(title=f"{escape(first['model'])}, width {first['width']}, {first['device']} {first['dtype']}")
    table.add_column("depth", justify="right")
    table.add_column("strategy")
    table.add_column("experts")
    timings = ("cold start\ns", "cold /\nhoisted", "pieces\ndistinct/all", "decode\nms", "prefill 128\nms")
    for name in (*timings, "peak\nMiB", "largest\nrel. error"):
        table.add_column(name, justify="right")
    notes = any(record["error"] is not None or record["fallback"] for record in records)
    if notes:
        table.add_column("note", overflow="fold", max_width=60)
    before = None
    for record in records:
        if before is not None and record["depth"] != before:
            table.add_section()
        before = record["depth"]
        cells = _cells(record, hoisted_cold_start(records, record))
        table.add_row(*(cells if notes else cells[:-1]))
    return table


def hoisted_cold_start(records: Sequence[Record], record: Record) -> float | None:
    """The cold start of `hoisted` at the model, depth and width of a record, in seconds."""
    for other in records:
        same = all(other[key] == record[key] for key in ("model", "depth", "width", "device", "dtype"))
        if same and other["strategy"] == "hoisted":
            cold: float | None = other["cold_start_s"]
            return cold
    return None


def _cells(record: Record, hoisted: float | None) -> list[str]:
    cold = record["cold_start_s"]
    pieces = NONE if record["pieces"] is None else f"{record['distinct_pieces']}/{record['pieces']}"
    note = escape(f"failed: {record['error']}" if record["error"] is not None else "; ".join(record["fallback"]))
    peak = record["cuda_peak_mb"] if record["cuda_peak_mb"] is not None else record["peak_rss_mb"]
    return [
        str(record["depth"]),
        record["strategy"],
        record["experts"],
        NONE if cold is None else seconds(cold),
        _number(cold / hoisted if cold is not None and hoisted else None, ".2f"),
        pieces,
        _number(record["steady_ms"]["decode"], ".2f"),
        _number(record["steady_ms"]["prefill128"], ".2f"),
        _number(peak, ".0f"),
        _number(record["max_rel_err"], ".0e"),
        note,
    ]


def seconds(value: float) -> str:
    """A time in seconds, with milliseconds below one second."""
    return format(value, ".2f" if value >= 1 else ".3f")


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)
