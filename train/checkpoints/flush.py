"""Brings files to the disk itself, piece by piece, so that a slow disk is told from one that has gone."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from runtime.activity import progress
from runtime.units import data_size

PIECE = 64 << 20  # bytes, a multiple of the page size


def flush(path: Path) -> None:
    """Return when the file or folder at `path` is on the disk; reports progress after every piece of a file."""
    progress(f"flushing {path.name}")
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        size = 0 if path.is_dir() else os.fstat(handle).st_size
        if size > PIECE:
            with mmap.mmap(handle, size) as view:
                for start in range(0, size, PIECE):
                    view.flush(start, min(PIECE, size - start))
                    progress(f"flushing {path.name}, {data_size(start)} of {data_size(size)}")
        os.fsync(handle)
    finally:
        os.close(handle)
