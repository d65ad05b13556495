"""Measures how long the processes of a node take to open a disk cache with many items.

    python benchmarks/cache_opening.py [--items 1000 10000 100000] [--processes 8] [--folder FOLDER]

The items are empty files. All processes open the cache at the same time, as at the start of a run; printed is the time
until the last one is done, median over the rounds. The first opening, which may upgrade the list of an older cache, is
printed separately. FOLDER is on the disk to measure; the files made there are removed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from storage.cache import DiskCache

BUDGET = 10**12


def fill(folder: Path, items: int) -> None:
    """Make a cache of that many items, as running processes leave it."""
    cache = DiskCache(str(folder), BUDGET)
    names = [sha256(str(number).encode()).hexdigest() for number in range(items)]
    with cache._transaction() as database:
        database.executemany("INSERT INTO items VALUES (?, 1, ?, NULL)", [(name, time.time()) for name in names])
    for start in {name[:2] for name in names}:
        (cache.folder / "items" / start).mkdir(exist_ok=True)
    for name in names:
        (cache.folder / "items" / name[:2] / name).touch()
    cache.close()


def seconds_to_open(folder: str) -> float:
    """Seconds that one process takes."""
    began = time.perf_counter()
    cache = DiskCache(folder, BUDGET)
    taken = time.perf_counter() - began
    cache.close()
    return taken


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line for each number of items."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    options = parser.parse_args(arguments)
    print(f"{'items':>10}{'first':>12}{'one process':>14}{f'{options.processes} at once':>14}")
    for items in options.items:
        folder = Path(tempfile.mkdtemp(prefix="cache-opening-", dir=options.folder))
        try:
            fill(folder, items)
            first = seconds_to_open(str(folder))
            alone = statistics.median(seconds_to_open(str(folder)) for _ in range(options.rounds))
            with get_context("spawn").Pool(options.processes) as pool:
                pool.map(seconds_to_open, [str(folder)] * options.processes, chunksize=1)  # has them started
                together = statistics.median(
                    max(pool.map(seconds_to_open, [str(folder)] * options.processes, chunksize=1))
                    for _ in range(options.rounds)
                )
        finally:
            shutil.rmtree(folder)
        times = "".join(
            f"{seconds * 1000:>{width}.1f} ms" for seconds, width in ((first, 9), (alone, 11), (together, 11))
        )
        print(f"{items:>10,}{times}", flush=True)


if __name__ == "__main__":
    main()
