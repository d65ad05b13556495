"""Charts of the report as inline SVG, coloured by the page's style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import floor, isfinite, log10

COLORS = 6  # --series-0 ... of the style sheet
WIDTH, HEIGHT = 440, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 28
POINTS = 400  # of a line


@dataclass(frozen=True)
class Line:
    """One curve: points (x, y) in ascending x."""

    name: str
    points: Sequence[tuple[float, float]]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers that cover [low, high]."""
    span = max(high - low, 1e-9)
    raw = span / count
    unit = 10.0 ** floor(log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    first = floor(low / step)
    values = [first * step]
    while values[-1] < high - 1e-9 * span:
        values.append(values[-1] + step)
    return values


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential mean of values, unbiased at the start."""
    result, total, share = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        share = weight * share + (1 - weight)
        result.append(total / share)
    return result


def line_chart(lines: Sequence[Line], x_label: str, from_zero: bool = True) -> str:
    """Curves over a common axis: the smoothed curve in front of its raw points, few points as dots.

    from_zero: whether the upward axis begins at zero. Empty without finite points.
    """
    lines = [Line(line.name, [p for p in line.points if isfinite(p[1])]) for line in lines]
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    x_high = max(x for x, _ in points) or 1.0
    low, high = min(y for _, y in points), _upper([y for _, y in points])
    y_ticks = ticks(min(0.0, low), high) if from_zero else ticks(low, max(high, low + 0.5))
    x_ticks = [value for value in ticks(0, x_high) if value <= x_high]
    scale = _Scale(0.0, x_high, y_ticks[0], y_ticks[-1])
    body = _axes(scale, x_ticks, y_ticks, x_label)
    for i, line in enumerate(lines):
        step = max(1, len(line.points) // POINTS)
        raw = [(x, min(y, y_ticks[-1])) for x, y in line.points[::step]]
        if not raw:
            continue
        weight = 0.0 if len(raw) < 20 else 0.9 if len(raw) > 100 else 0.7
        even = list(zip([x for x, _ in raw], smooth([y for _, y in raw], weight)))
        if weight:
            body.append(f'<path class="raw" style="stroke:var(--series-{i % COLORS})" d="{scale.path(raw)}"/>')
        body.append(f'<path class="line" style="stroke:var(--series-{i % COLORS})" d="{scale.path(even)}"/>')
        if not weight:
            body += [f'<circle r="3" style="fill:var(--series-{i % COLORS})" {scale.place(*point)}/>' for point in raw]
    return _svg(body, WIDTH, HEIGHT, ", ".join(line.name for line in lines) + f" over {x_label}")


def _upper(values: Sequence[float]) -> float:
    """The highest value worth showing: a few spikes at the start do not flatten the rest."""
    ordered = sorted(values)
    return max(ordered[int(0.99 * (len(ordered) - 1))], 1e-6)


@dataclass(frozen=True)
class _Scale:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.y_low) / (self.y_high - self.y_low)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)

    def place(self, x: float, y: float) -> str:
        return f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}"'


def _axes(scale: _Scale, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str) -> list[str]:
    body = []
    for value in y_ticks:
        y = scale.y(value)
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y + 4:.1f}">{value:g}</text>')
    for x, value in ((scale.x(value), value) for value in x_ticks):
        if x > WIDTH - RIGHT - 50:  # the axis is named there
            continue
        body.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{HEIGHT - 8}">{value:g}</text>')
    body.append(f'<text class="tick" text-anchor="end" x="{WIDTH - RIGHT}" y="{HEIGHT - 8}">{escape(x_label)}</text>')
    return body


def _svg(body: Sequence[str], width: float, height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title, quote=True)}">'
        + "".join(body)
        + "</svg>"
    )
