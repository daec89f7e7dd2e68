"""Draws cold start against depth, one line a strategy. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glowplug.bench.environment import machine_line
from glowplug.bench.record import Record
from glowplug.bench.strategies import STRATEGIES
from glowplug.errors import UsageError

# Colour-blind safe (after Okabe and Ito); a strategy keeps its colour and marker in every plot.
_COLOURS = ("#000000", "#e69f00", "#56b4e9", "#cc79a7", "#d55e00", "#0072b2", "#009e73", "#8c6d31")
_MARKERS = "oDsXv^PH"


def check_plot(path: Path) -> None:
    """Raise `UsageError` when matplotlib is missing or can't write files of that kind."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as exc:
        raise UsageError("--plot needs matplotlib: pip install 'glowplug[plot]'") from exc
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in kinds:
        raise UsageError(f"--plot can't write {path.name!r}: give it one of the endings {', '.join(sorted(kinds))}")


def draw(records: Sequence[Record], environment: dict[str, Any], path: Path) -> None:
    """Draw the records that have a cold start, and write the file.

    Args:
        records: of one model and width, any depths.
        environment: as `describe_environment` gives it.
        path: its ending says the format.

    Raises:
        UsageError: no record has a cold start.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    measured = [record for record in records if record["cold_start_s"] is not None]
    if not measured:
        raise UsageError("nothing to plot: no strategy finished")
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    depths = sorted({record["depth"] for record in measured})
    for index, strategy in enumerate(STRATEGIES):
        points = sorted((r["depth"], r["cold_start_s"]) for r in measured if r["strategy"] == strategy)
        if not points:
            continue
        colour = _COLOURS[index % len(_COLOURS)]
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=6,
            linewidth=2.2 if STRATEGIES[strategy].compiles_by == "glowplug" else 1.5,
            linestyle="-" if STRATEGIES[strategy].compiles_by == "glowplug" else "--",
            label=strategy,
        )
    first = measured[0]
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(depths)
    axes.set_xlabel("depth (layers)")
    axes.set_ylabel("cold start (s): compile call to second token")
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
