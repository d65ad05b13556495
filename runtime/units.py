"""Durations and sizes as text for people."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Three digits in the unit that fits: 0.4 s, 3 s, 4.2 min, 1.5 h, 3.01 days."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{round(seconds / size, 1):.3g} {unit}"
    return f"{seconds / 86400:.3g} days"


def data_size(num_bytes: float) -> str:
    """A size with one decimal in a suitable decimal unit: 512 bytes, 4.2 kB, 7.5 MB, 1.2 GB, 3,400.0 TB."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} bytes"
    for size, unit in ((1e3, "kB"), (1e6, "MB"), (1e9, "GB")):
        if num_bytes < 999.95 * size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1e12:,.1f} TB"
