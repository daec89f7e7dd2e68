"""Draws cold start against depth, one line a strategy. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glowplug.bench.results.environment import machine_line
from glowplug.bench.results.record import Record
from glowplug.bench.strategies import STRATEGIES
from glowplug.errors import UsageError

# Colour-blind safe (after Okabe and Ito); a strategy keeps its colour and marker in every plot.
_COLOURS = (
    *("#000000", "#e69f00", "#56b4e9", "#cc79a7", "#d55e00", "#0072b2"),
    *("#009e73", "#8c6d31", "#999999", "#f0e442", "#882255"),
)
_MARKERS = "oDsXv^PHd<>"


def check_plot(path: Path) -> None:
    """Raise `UsageError` if matplotlib is missing or can't write this file type."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as exc:
        raise UsageError("--plot needs matplotlib: pip install 'glowplug[plot]'") from exc
    filetypes = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in filetypes:
        raise UsageError(f"--plot can't write {path.name!r}: give it one of the endings {', '.join(sorted(filetypes))}")


def draw(records: Sequence[Record], environment: dict[str, Any], path: Path) -> None:
    """Draw the cold starts and write the file; eager, which compiles nothing, is left out.

    Args:
        records: of one model and width, any depths.
        environment: as `describe_environment` gives it.
        path: its suffix sets the format.

    Raises:
        UsageError: no record has a cold start.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    measured = [record for record in records if record["cold_start_s"] is not None]
    measured = [record for record in measured if STRATEGIES[record["strategy"]].compiles_by] or measured
    if not measured:
        raise UsageError("nothing to plot: no strategy finished")
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    # The legend reads from top to bottom as the lines do at the right end.
    for name in sorted({r["strategy"] for r in measured}, key=lambda name: -_last(measured, name)):
        _draw_line(axes, name, sorted((r for r in measured if r["strategy"] == name), key=lambda r: r["depth"]))
    first = measured[0]
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(sorted({r["depth"] for r in measured}))
    axes.set_xlabel("depth (layers)")
    axes.set_ylabel("cold start (s), compile call to second token")
    experts = "/".join(sorted({r["experts"] for r in measured if STRATEGIES[r["strategy"]].compiles_by == "glowplug"}))
    detail = f"{first['dtype']}, width {first['width']}" + (f", experts {experts}" if experts else "")
    axes.set_title(f"{first['model']}: cold start by depth", loc="left", fontsize=13, fontweight="bold", pad=24)
    axes.text(
        0, 1.02, f"{machine_line(environment)}; {detail}", transform=axes.transAxes, fontsize=8.5, color="#555555"
    )
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    try:
        figure.savefig(path, dpi=160)
    except OSError as exc:
        raise UsageError(f"can't write {path}: {exc.strerror or exc}") from exc
    finally:
        pyplot.close(figure)


def _last(records: Sequence[Record], strategy: str) -> float:
    """The cold start of a strategy at its greatest depth, in seconds."""
    return float(max((r["depth"], r["cold_start_s"]) for r in records if r["strategy"] == strategy)[1])


def _draw_line(axes: Any, strategy: str, records: Sequence[Record]) -> None:
    """Draw one strategy, with hollow markers if it left something eager, which makes a start cheap."""
    index = list(STRATEGIES).index(strategy)
    ours = STRATEGIES[strategy].compiles_by == "glowplug"
    colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
    depths = [record["depth"] for record in records]
    times = [record["cold_start_s"] for record in records]
    partly = any(record["fallback"] for record in records)
    later = any(record.get("pending_pieces") for record in records)
    note = "\n(partly eager)" if partly else "\n(some pieces deferred)" if later else ""
    axes.plot(
        depths,
        times,
        color=colour,
        marker=marker,
        markersize=7,
        markerfacecolor="white" if partly else colour,
        markeredgewidth=1.5,
        linewidth=2.2 if ours else 1.5,
        linestyle="-" if ours else "--",
        label=f"{strategy}{note}",
    )
