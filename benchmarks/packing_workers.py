"""Compares ways to use several cores in packing: processes, threads, or the decoder's own threads.

    python benchmarks/packing_workers.py --photos FOLDER --clips FOLDER --workers 2 --rounds 5

The same shards are built by that many processes, by that many threads of one process, and, for clips, one at a time by
a decoder with that many threads. All take turns; medians of wall and CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cv2  # noqa: E402

from runtime.process_pool import Advance, run_tasks  # noqa: E402
from sharding.annotations.config import Reading  # noqa: E402
from sharding.annotations.reading import read_rows  # noqa: E402
from sharding.annotations.staging import stage  # noqa: E402
from sharding.executors.build_shard import build_shard  # noqa: E402
from sharding.media import video  # noqa: E402
from sharding.shards.plan import ShardSettings, Task, plan_shards  # noqa: E402
from storage.web import Fetching  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"
Way = Callable[[list[Task], int], float]  # shards, how many at once -> seconds of the processor


def nothing(good: int, bad: int, size: int) -> None:
    """Progress that is not shown."""


def build(task: Task, advance: Advance) -> float:
    """Build a shard; CPU seconds of this process meanwhile."""
    begun = time.process_time()
    build_shard(task, advance)
    return time.process_time() - begun


def processes(tasks: list[Task], workers: int) -> float:
    """As in `sharding.build`."""
    return sum(seconds for _, seconds in run_tasks(build, tasks, workers, nothing))


def threads(tasks: list[Task], workers: int) -> float:
    """Shards in parallel in one process."""
    begun = time.process_time()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda task: build_shard(task, nothing), tasks))
    return time.process_time() - begun


def decoder(tasks: list[Task], workers: int) -> float:
    """One shard after the other; each clip is decoded by several threads."""

    class Threaded(video.Clip):
        def __init__(self, container: object) -> None:
            super().__init__(container)  # type: ignore[arg-type]
            self.stream.thread_type = "AUTO"
            self.stream.codec_context.thread_count = workers

    with mock.patch.object(video, "Clip", Threaded):
        return sum(build(task, nothing) for task in tasks)


def timed(way: Way, source: Path, media_type: str, workers: int) -> tuple[float, float]:
    """Wall and CPU seconds of packing a folder."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as place:
        folder = Path(place)
        found = sorted(path for path in source.rglob("*") if path.is_file())
        records = [{media_type: str(path.relative_to(source)), "caption": "x"} for path in found]
        (folder / "a.json").write_text(json.dumps(records))
        staged = stage(read_rows([str(folder / "a.json")], Reading()), folder / "rows.sqlite", folder)
        (folder / "out").mkdir()
        settings = ShardSettings("x", media_type, size=128 if media_type == "image" else 224)
        tasks = plan_shards(staged, settings, str(source), str(folder / "out"), folder, Fetching())
        begun = time.monotonic()
        used = way(tasks, workers)
        seconds = time.monotonic() - begun
        assert len(list((folder / "out").glob("*.parquet"))) == len(tasks)
        return seconds, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=SHARED / "flickr8k" / "images")
    parser.add_argument("--clips", type=Path, default=SHARED / "videos" / "media")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    for source, kind in ((options.photos, "image"), (options.clips, "video")):
        ways: list[Way] = [processes, threads] + ([decoder] if kind == "video" else [])
        found: dict[str, list[tuple[float, float]]] = {way.__name__: [] for way in ways}
        for number in range(options.rounds):
            for way in ways if number % 2 == 0 else reversed(ways):
                found[way.__name__].append(timed(way, source, kind, options.workers))
        print(f"{source}, {options.workers} at once")
        for name, values in found.items():
            clock, used = (median(column) for column in zip(*values, strict=True))
            print(f"  {name:10} {clock:7.2f} s wall time, {used:7.2f} s CPU time", flush=True)


if __name__ == "__main__":
    main()
