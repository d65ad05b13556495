"""Charts drawn by matplotlib: inline SVG that follows a page's light or dark colours, and PNG."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # matplotlib is slow to import: only drawing does it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = (
    "#3d63dd", "#e2711d", "#129a7f", "#9b4dca", "#d6336c", "#7a8b2e", "#1f9bb8", "#a0703c", "#7d7f88", "#c9a100",
)  # fmt: skip
TEXT, GRID, BAR = "#6c6f78", "#e5e5e1", "#3557d6"
# The CSS variables of the pages that replace the colours in inline SVG.
VARIABLES = {TEXT: "--muted", GRID: "--line", BAR: "--accent"} | {c: f"--series-{i}" for i, c in enumerate(COLORS)}
SMOOTH_FROM = 40  # points of a curve; one with fewer is drawn as it is
MAX_POINTS = 400  # of a curve
DPI = 110


@dataclass(frozen=True)
class Curve:
    """Points (x, y) in ascending x. color: its number in COLORS. markers: single measurements, never smoothed."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    dashed: bool = False
    markers: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves over common axes. from_zero: the y axis starts at zero, and rare spikes are cut off."""

    curves: Sequence[Curve]
    title: str = ""
    x_label: str = "step"
    from_zero: bool = False


def panel_svg(panel: Panel) -> str:
    """A panel as inline SVG without a legend; empty where it has no finite point."""
    if not any(isfinite(y) for curve in panel.curves for _, y in curve.points):
        return ""
    figure = _figure(4.4, 2.2)
    _draw_panel(figure.subplots(), panel)
    return svg(figure, ", ".join(curve.name for curve in panel.curves) + f" over {panel.x_label}")


def panels_figure(panels: Sequence[Panel]) -> Figure:
    """Up to three panels side by side, with a common legend if there are several curves."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(5 * columns, 3 * rows)
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes, panel in zip(all_axes, panels):
        _draw_panel(axes, panel)
    for axes in all_axes[len(panels) :]:
        axes.axis("off")
    handles, labels = max((axes.get_legend_handles_labels() for axes in all_axes), key=lambda both: len(both[1]))
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), labelcolor=TEXT)
    return figure


def histogram_svg(name: str, bins: Mapping[str, int], open_bins: Sequence[str] = ()) -> str:
    """Counts by the bins' names as inline SVG; `open_bins`, which have one limit only, are drawn paler."""
    figure = _figure(2.8, 1.3)
    axes = figure.subplots()
    bars = axes.bar(range(len(bins)), list(bins.values()), width=0.9, color=BAR)
    for bar, bin_name in zip(bars, bins):
        bar.set_alpha(0.45 if bin_name in open_bins else 1.0)
    step = -(-len(bins) * max(map(len, bins)) // 28)  # so that names do not overlap
    axes.set_xticks(range(0, len(bins), step), list(bins)[::step])
    axes.locator_params(axis="y", nbins=3, integer=True)
    _style(axes)
    return svg(figure, f"histogram of {name}")


def grouped_bars(
    names: Sequence[str],
    series: Mapping[str, Sequence[tuple[float, float | tuple[float, float]]]],
    marks: Sequence[float],
    x_label: str,
) -> Figure:
    """Horizontal bars in percent: for each of `names` one a series, as (value, error), and a mark across them.

    An error may be a pair: how far it reaches below the value, and above.
    """
    figure = _figure(9, 0.7 * len(names) + 1.5)
    axes = figure.subplots()
    rows = range(len(names) - 1, -1, -1)
    for number, (label, values) in enumerate(series.items()):
        step = 0.8 / len(series)
        heights = [row + 0.4 - step * (number + 0.5) for row in rows]
        errors = list(zip(*(error if isinstance(error, tuple) else (error, error) for _, error in values)))
        shown, color = [value for value, _ in values], COLORS[number % len(COLORS)]
        axes.barh(heights, shown, 0.95 * step, xerr=errors, ecolor=TEXT, color=color, label=label)
    for row, mark in zip(rows, marks):
        axes.plot([mark] * 2, [row - 0.42, row + 0.42], color="black", linewidth=1.5)
    axes.set_yticks(rows, names)
    axes.set_xlim(0, 100)
    axes.set_xlabel(x_label, color=TEXT)
    _style(axes, grid="x")
    figure.legend(loc="outside upper center", ncols=len(series))
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG on white."""
    output = io.BytesIO()
    figure.savefig(output, format="png", dpi=DPI)
    return output.getvalue()


def svg(figure: Figure, label: str) -> str:
    """The figure as inline SVG, the same bytes each time: texts stay texts, colours are the page's CSS variables."""
    import matplotlib

    output = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "singularity"}):
        figure.savefig(output, format="svg", transparent=True, metadata=nothing)
    text = output.getvalue()
    width, height = figure.get_size_inches() * 72
    body = text[text.index(">", text.index("<svg")) + 1 :]
    # A style sheet would hold for the whole page; the page chooses the font.
    body = re.sub(
        r"<style.*?</style>| id=\"(?:figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick)_\d+\"|"
        r"font-family: [^;\"]*; ",
        "",
        body,
        flags=re.DOTALL,
    )
    body = re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var({VARIABLES[m[0]]}, {m[0]})" if m[0] in VARIABLES else m[0], body)
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label, quote=True)}">'
    return head + body.strip()


def smooth(values: Sequence[float]) -> list[float]:
    """A running mean over a fortieth of the values; its ends have fewer."""
    half = max(1, len(values) // SMOOTH_FROM)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    edges = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[last] - sums[first]) / (last - first) for first, last in edges]


def _figure(width: float, height: float) -> Figure:
    # matplotlib warns where it cannot write its cache, as on a read-only home.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _draw_panel(axes: Axes, panel: Panel) -> None:
    shown: list[float] = []
    for curve in panel.curves:
        points = [point for point in curve.points if isfinite(point[1])]
        if not points:
            continue
        x, y = [x for x, _ in points], [y for _, y in points]
        shown += y
        color, every = COLORS[curve.color % len(COLORS)], max(1, len(x) // MAX_POINTS)
        if len(y) >= SMOOTH_FROM and not curve.markers:
            axes.plot(x[::every], y[::every], color=color, alpha=0.25, linewidth=0.8)
            y = smooth(y)
        marker = "o" if curve.markers or len(y) == 1 else None
        style = "--" if curve.dashed else "-"
        axes.plot(
            x[::every], y[::every], style, color=color, marker=marker, markersize=4, linewidth=1.6, label=curve.name
        )
    axes.set_title(panel.title, fontsize=10, color=TEXT)
    axes.set_xlabel(panel.x_label, fontsize=8, color=TEXT)
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=6, integer=True)
    if panel.from_zero and shown:
        highest = sorted(shown)[int(0.99 * (len(shown) - 1))]
        axes.set_ylim(min(0.0, *shown), max(1.3 * highest, 1e-6))
    _style(axes)


def _style(axes: Axes, grid: str = "y") -> None:
    axes.grid(axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8, labelcolor=TEXT)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
