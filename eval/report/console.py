"""Metrics as a plain table for the console."""

from __future__ import annotations

from collections.abc import Mapping

SHORT = {"r_mean": "mean", "txt_r_mean": "txt_mean", "img_r_mean": "img_mean"}


def format_table(
    metrics: Mapping[str, Mapping[str, float]], baselines: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """Lines of a table: a row an entry of `metrics` ("SPLIT/": {"txt_r1": ...}), in percent, a column a metric.

    baselines: rows of the same form, set off below, such as chance.
    """
    rows = [(name.rstrip("/"), values) for name, values in metrics.items()]
    low = [(name, values) for name, values in (baselines or {}).items()]
    columns = list(dict.fromkeys(column for _, values in rows for column in values))
    width = max([len(name) for name, _ in rows + low], default=0)
    widths = [max(6, len(SHORT.get(column, column))) for column in columns]
    head = " " * width + "".join(f"  {SHORT.get(c, c):>{w}}" for c, w in zip(columns, widths))
    rule = "-" * len(head)
    lines = [head, rule, *(_line(name, values, columns, width, widths) for name, values in rows)]
    if low:
        lines += [rule, *(_line(name, values, columns, width, widths) for name, values in low)]
    return "\n".join(lines)


def _line(name: str, values: Mapping[str, float], columns: list[str], width: int, widths: list[int]) -> str:
    cells = (f"{values[c]:>{w}.2f}" if c in values else " " * w for c, w in zip(columns, widths))
    return f"{name:<{width}}" + "".join(f"  {cell}" for cell in cells)
