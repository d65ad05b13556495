"""`python -m sharding.build`: annotations and media files to webdataset shards with their indices."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from sharding.annotations import Item, read_items
from sharding.output import claim, local_form, open_output, remove, write_text
from sharding.plan import Settings, Task, plan_shards
from sharding.schema import MEDIA_TYPES, Corpus, join_url
from sharding.workers import build_shards
from sharding.writing import FinishedShard, finished_shard, publish

log = logging.getLogger("sharding")


def build_corpus(
    annotations: Sequence[str],
    media_root: str,
    media_type: str,
    output: str,
    name: str = "",
    size: int = 224,
    fps: float = 2.0,
    max_frames: int = 0,
    shard_mb: int = 256,
    workers: int | None = None,
    quality: int = 90,
    max_failures: float = 0.05,
    retry_failed: bool = False,
    progress: bool = False,
) -> Corpus:
    """Pack annotated media into shards at `output` (a folder or an fsspec URL) and describe them in `corpus.json`.

    Shards that an interrupted build completed are kept; the result is byte-identical whatever `workers` is.
    `size` is the shorter side of stored frames in pixels, `fps` their rate, `max_frames` 0 means all.

    `retry_failed` builds shards again that miss media, after those were mended.

    Raises:
        FileNotFoundError: an annotation file or the media root is missing.
        ValueError: bad settings or annotations, an output that holds something else or is in use,
            or a larger share of failed media than `max_failures`.
    """
    output, media_root = local_form(output), local_form(media_root)
    name = name or re.sub(r"[^A-Za-z0-9_-]+", "_", output.rstrip("/").rsplit("/", 1)[-1])[:60] or "corpus"
    settings = Settings(name, media_type, size, quality, float(fps), max_frames, shard_mb)
    settings.check()
    if "://" not in media_root and not Path(media_root).is_dir():
        raise FileNotFoundError(f"media root {media_root} does not exist: check --media-root")
    items = read_items(annotations)
    if not items:
        raise ValueError(f"no records in {', '.join(annotations)}: nothing to pack")
    with open_output(output) as scratch:
        claim(output, settings, annotations, len(items), scratch)
        tasks = plan_shards(items, settings, media_root, output, scratch)
        shards = pack(tasks, workers or os.cpu_count() or 1, retry_failed, progress)
        corpus = Corpus(output, name, media_type, tuple(shard.info for shard in shards), asdict(settings))
        failures = [failure for shard in shards for failure in shard.failures]
        write_failures(output, failures, scratch)
        report(items, shards, output)
        if len(failures) > max_failures * len(items):
            raise ValueError(
                f"{len(failures)} of {len(items)} media failed ({len(failures) / len(items):.1%}, at most "
                f"{max_failures:.1%} allowed): see {join_url(output, 'failures.parquet')}; mend them and run this "
                "again with --retry-failed, or raise --max-failures"
            )
        write_text(join_url(output, "corpus.json"), corpus.to_json(), scratch)
    return corpus


def pack(tasks: list[Task], workers: int, retry_failed: bool, progress: bool) -> list[FinishedShard]:
    """Every shard, in order; those already complete are not built again."""
    shards: dict[int, FinishedShard] = {}
    packed = failed = 0
    total = sum(len(task.items) for task in tasks)
    with tqdm(total=total, unit="item", desc=f"packing {tasks[0].settings.name}", disable=not progress) as bar:

        def advance(good: int, bad: int) -> None:
            nonlocal packed, failed
            packed, failed = packed + good, failed + bad
            if failed:
                bar.set_postfix(failed=failed, refresh=False)
            bar.update(good + bad)

        for task in tasks:
            done = finished_shard(task.output, task.name)
            if done and not (retry_failed and done.failures):
                shards[task.number] = done
                advance(done.info.samples, len(done.failures))
        pending = [task for task in tasks if task.number not in shards]
        bar.initial = bar.n  # what an earlier build did says nothing about the rate of this one
        if pending:
            unpublish(pending)
        shards.update(build_shards(pending, workers, advance))
    return [shards[task.number] for task in tasks]


def unpublish(tasks: list[Task]) -> None:
    """Before shards are built anew: what describes older ones goes first, so that nothing looks complete."""
    remove(join_url(tasks[0].output, "corpus.json"))
    for task in tasks:
        remove(join_url(task.output, task.name.removesuffix(".tar") + ".parquet"))


def write_failures(output: str, failures: list[dict[str, Any]], scratch: Path) -> None:
    """Write `failures.parquet`: source, annotation rows lost with it, reason."""
    schema = pa.schema([("source", pa.string()), ("rows", pa.int64()), ("reason", pa.string())])
    path = scratch / "failures.parquet"
    pq.write_table(pa.Table.from_pylist(failures, schema=schema), path)
    publish(path, join_url(output, path.name))


def report(items: list[Item], shards: list[FinishedShard], output: str) -> None:
    """Log the account; every annotation row was packed or failed, or it is an error of this program."""
    rows, packed_rows = sum(item.rows for item in items), sum(shard.rows for shard in shards)
    failures = [failure for shard in shards for failure in shard.failures]
    failed_rows = sum(failure["rows"] for failure in failures)
    samples = sum(shard.info.samples for shard in shards)
    if rows != packed_rows + failed_rows or len(items) != samples + len(failures):
        raise RuntimeError(
            f"{output}: {rows} rows, {packed_rows} packed, {failed_rows} failed; "
            f"{len(items)} media, {samples} packed, {len(failures)} failed: the numbers do not add up"
        )
    log.info("%d rows = %d packed + %d failed", rows, packed_rows, failed_rows)
    log.info("%d media = %d packed + %d failed", len(items), samples, len(failures))
    reasons = Counter(failure["reason"] for failure in failures)
    for reason, count in reasons.most_common(10):
        log.info("  %6d x %s", count, reason)
    if len(reasons) > 10:
        log.info("  and %d more reasons, all in failures.parquet", len(reasons) - 10)
    frames = sum(shard.info.frames for shard in shards)
    size = sum(shard.info.bytes for shard in shards)
    log.info("%s: %d shards, %d samples, %d frames, %.1f MB", output, len(shards), samples, frames, size / 1e6)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        "python -m sharding.build", description="Pack images or videos with their texts into webdataset shards."
    )
    add = result.add_argument
    add(
        "--annotations",
        nargs="+",
        required=True,
        metavar="FILE",
        help='JSON lists of {"image" or "video": path, "caption": ...}',
    )
    add("--media-root", required=True, metavar="URL", help="folder that the media paths start from")
    add("--media-type", required=True, choices=MEDIA_TYPES)
    add(
        "--output",
        required=True,
        metavar="URL",
        help="folder of the packed corpus; run again to go on after an interruption",
    )
    add("--name", default="", help="first part of the shards' file names (default: the output folder's name)")
    add("--size", type=int, default=224, help="shorter side of stored frames in pixels (default: %(default)s)")
    add("--fps", type=float, default=2.0, help="stored frames a second of video (default: %(default)s)")
    add("--max-frames", type=int, default=0, help="at most so many frames a clip (default: all)")
    add("--shard-mb", type=int, default=256, help="aim for shards of this size (default: %(default)s)")
    add("--workers", type=int, default=None, help="processes (default: one a core)")
    add("--quality", type=int, default=90, help="JPEG quality, 1 to 100 (default: %(default)s)")
    add("--max-failures", type=float, default=0.05, help="largest share of broken media (default: %(default)s)")
    add("--retry-failed", action="store_true", help="build the shards again that miss media, after mending those")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = vars(parser().parse_args(arguments))
    try:
        build_corpus(progress=True, **options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: run the same command again to go on\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
