"""`python -m sharding.build`: annotations and media files to webdataset shards with their indices."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from sharding.annotations import Item, read_items
from sharding.media import Frames, MediaError, pack_image, pack_video
from sharding.schema import MEDIA_TYPES, VERSION, Corpus, ShardInfo, join_url
from sharding.writing import ShardWriter, finished_shard, publish

log = logging.getLogger("sharding")

FRAMES_PER_CLIP = 24  # assumed when clips are spread over shards, before any is opened
BYTES_PER_PIXEL = 0.25  # of a JPEG at the usual quality, assumed likewise
SMALLEST_SHARD = 64  # samples; and a corpus is cut into at least SPREAD shards as soon as they are that large
SPREAD = 16


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the shards, besides annotations and media."""

    name: str
    media_type: str
    size: int
    quality: int
    fps: float
    max_frames: int
    shard_mb: int

    def samples_per_shard(self, samples: int) -> int:
        """How many of `samples` items go into each shard; depends on nothing else."""
        frames = 1 if self.media_type == "image" else self.max_frames or FRAMES_PER_CLIP
        by_size = self.shard_mb * 2**20 / (frames * self.size**2 * 4 / 3 * BYTES_PER_PIXEL)
        return max(1, min(int(by_size), max(SMALLEST_SHARD, math.ceil(samples / SPREAD))))


@dataclass(frozen=True)
class Task:
    """One shard to build: its number, its items, where from and where to."""

    number: int
    items: list[Item]
    media_root: str
    output: str
    scratch: str
    settings: Settings

    @property
    def name(self) -> str:
        """The shard's file name."""
        return f"{self.settings.name}-{self.number:06d}.tar"


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
    progress: bool = False,
) -> Corpus:
    """Pack annotated media into shards at `output` (a folder or an fsspec URL) and describe them in `corpus.json`.

    Shards that an interrupted build completed are kept; the result is byte-identical whatever `workers` is.
    `size` is the shorter side of stored frames in pixels, `fps` their rate, `max_frames` 0 means all.

    Raises:
        FileNotFoundError: an annotation file or the media root is missing.
        ValueError: bad settings or annotations, an output that holds something else,
            or a larger share of failed media than `max_failures`.
    """
    name = name or re.sub(r"[^A-Za-z0-9_-]+", "_", output.rstrip("/").rsplit("/", 1)[-1])[:60] or "corpus"
    settings = Settings(name, media_type, size, quality, float(fps), max_frames, shard_mb)
    check(settings, media_root)
    items = read_items(annotations)
    if not items:
        raise ValueError(f"no records in {', '.join(annotations)}: nothing to pack")
    claim_output(output, settings, annotations)
    local = "://" not in output
    scratch = str(Path(output) / ".partial") if local else tempfile.mkdtemp(prefix="singularity-build-")
    try:
        results = build_shards(items, settings, media_root, output, scratch, workers, progress)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    failures = [failure for _, failed in results for failure in failed]
    corpus = Corpus(output, name, media_type, tuple(info for info, _ in results), asdict(settings))
    report(items, corpus, failures, output)
    share = len(failures) / len(items)
    if share > max_failures:
        raise ValueError(
            f"{len(failures)} of {len(items)} media failed ({share:.1%}, at most {max_failures:.1%} allowed): "
            f"see {join_url(output, 'failures.parquet')}, mend them or raise --max-failures, then run this again"
        )
    write_text(join_url(output, "corpus.json"), corpus.to_json())
    return corpus


def check(settings: Settings, media_root: str) -> None:
    """Refuse settings that cannot work, each with the remedy."""
    if settings.media_type not in MEDIA_TYPES:
        raise ValueError(f"--media-type is {settings.media_type!r}, must be image or video")
    if settings.size < 16 or settings.fps <= 0 or settings.max_frames < 0 or not 1 <= settings.quality <= 100:
        raise ValueError("--size must be at least 16, --fps above 0, --max-frames 0 or more, --quality 1 to 100")
    if "." in settings.name or "/" in settings.name or not 1 <= len(settings.name) <= 60:
        raise ValueError(f"--name {settings.name!r} must be 1 to 60 characters without dots and slashes")
    if "://" not in media_root and not Path(media_root).is_dir():
        raise FileNotFoundError(f"media root {media_root} does not exist: check --media-root")


def claim_output(output: str, settings: Settings, annotations: Sequence[str]) -> None:
    """Mark the output as this build's; raise ValueError when it holds another's."""
    digest = hashlib.sha256()
    for file in annotations:
        with fsspec.open(file, "rb") as handle:
            digest.update(handle.read())
    plan = {"version": VERSION, **asdict(settings), "annotations_sha256": digest.hexdigest()}
    place = join_url(output, "build.json")
    filesystem, path = fsspec.url_to_fs(place)
    if filesystem.exists(path):
        with filesystem.open(path, "rt") as handle:
            found = json.load(handle)
        different = sorted(key for key in plan if plan[key] != found.get(key))
        if different:
            raise ValueError(
                f"{output} holds a corpus built with another {', '.join(different)}: "
                "choose another --output, or delete that folder first"
            )
        return
    if "://" not in output and Path(output).is_dir() and any(Path(output).iterdir()):
        raise ValueError(f"{output} is not empty and holds no build of this tool: choose another --output")
    filesystem.makedirs(filesystem._parent(path), exist_ok=True)
    write_text(place, json.dumps(plan, indent=1) + "\n")


def write_text(url: str, text: str) -> None:
    """Write a small file so that it is whole or absent."""
    with tempfile.NamedTemporaryFile("w", delete=False, dir=None if "://" in url else Path(url).parent) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    publish(Path(file.name), url)


def build_shards(
    items: list[Item],
    settings: Settings,
    media_root: str,
    output: str,
    scratch: str,
    workers: int | None,
    progress: bool,
) -> list[tuple[ShardInfo, list[dict[str, Any]]]]:
    """Every shard's description and failures, in order; those already complete are not built again."""
    each = settings.samples_per_shard(len(items))
    tasks = [
        Task(number, items[first : first + each], media_root, output, scratch, settings)
        for number, first in enumerate(range(0, len(items), each))
    ]
    results: dict[int, tuple[ShardInfo, list[dict[str, Any]]]] = {}
    bar = tqdm(total=len(items), unit="item", desc=f"packing {settings.name}", disable=not progress)
    pending = []
    for task in tasks:
        done = finished_shard(output, task.name)
        if done is None:
            pending.append(task)
        else:
            results[task.number] = done
            bar.update(len(task.items))
    for number, result in run_tasks(pending, workers or os.cpu_count() or 1):
        results[number] = result
        bar.update(len(tasks[number].items))
        bar.set_postfix(failed=sum(len(failed) for _, failed in results.values()), refresh=False)
    bar.close()
    return [results[number] for number in range(len(tasks))]


def run_tasks(tasks: list[Task], workers: int) -> Any:
    """(number, result) of each task as it is finished, on that many processes."""
    if workers == 1 or len(tasks) <= 1:
        yield from ((task.number, build_shard(task)) for task in tasks)
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context) as pool:
        futures = {pool.submit(build_shard, task): task.number for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def build_shard(task: Task) -> tuple[ShardInfo, list[dict[str, Any]]]:
    """Build one shard whole; runs in a worker process."""
    writer = ShardWriter(task.output, task.name, task.scratch)
    failures = []
    for number, item in enumerate(task.items):
        try:
            frames = pack_media(item.source, task)
        except MediaError as error:
            failures.append({"source": item.source, "rows": item.rows, "reason": str(error)})
            continue
        writer.add(f"{task.number:06d}{number:06d}", frames.jpegs, index_row(item, frames))
    return writer.close(failures), failures


def pack_media(source: str, task: Task) -> Frames:
    """Read and convert one media file; raises MediaError with the reason when that fails."""
    try:
        with fsspec.open(join_url(task.media_root, source), "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise MediaError("file not found") from None
    except OSError as error:
        raise MediaError(f"unreadable file: {error.strerror or error}") from None
    settings = task.settings
    if settings.media_type == "image":
        return pack_image(data, settings.size, settings.quality)
    return pack_video(data, settings.size, settings.quality, settings.fps, settings.max_frames)


def index_row(item: Item, frames: Frames) -> dict[str, Any]:
    """A sample's columns of the index other than those about its bytes; also its JSON in the tar."""
    return {
        "width": frames.width,
        "height": frames.height,
        "fps": frames.fps,
        "duration": frames.duration,
        "frame_times": list(frames.times),
        "source": item.source,
        "captions": item.captions,
        "questions": item.questions,
        "choices": item.choices,
    }


def report(items: list[Item], corpus: Corpus, failures: list[dict[str, Any]], output: str) -> None:
    """Write `failures.parquet` and log the account: rows = packed + failed."""
    schema = pa.schema([("source", pa.string()), ("rows", pa.int64()), ("reason", pa.string())])
    with fsspec.open(join_url(output, "failures.parquet"), "wb") as file:
        pq.write_table(pa.Table.from_pylist(failures, schema=schema), file)
    rows = sum(item.rows for item in items)
    failed = sum(failure["rows"] for failure in failures)
    if corpus.samples + len(failures) != len(items):
        raise RuntimeError(f"{output}: {len(items)} media in, {corpus.samples} packed, {len(failures)} failed")
    log.info(
        "%d rows about %d media: %d media packed, %d failed (%d rows)",
        rows,
        len(items),
        corpus.samples,
        len(failures),
        failed,
    )
    for reason, count in Counter(failure["reason"] for failure in failures).most_common(10):
        log.info("  %6d x %s", count, reason)
    frames = sum(shard.frames for shard in corpus.shards)
    size = sum(shard.bytes for shard in corpus.shards)
    log.info(
        "%s: %d shards, %d samples, %d frames, %.1f MB", output, len(corpus.shards), corpus.samples, frames, size / 1e6
    )


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
    return 0


if __name__ == "__main__":
    sys.exit(main())
