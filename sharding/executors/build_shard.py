"""Builds one shard: reads its media, converts them, writes tar and index."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime.process_pool import Advance
from sharding.annotations.items import Item, split_segment
from sharding.media.frames import Frames, MediaError
from sharding.media.image import pack_image
from sharding.media.sources import Media, opened
from sharding.media.video import pack_video
from sharding.shards.plan import ShardSettings, Task
from sharding.shards.writing import FinishedShard, ShardWriter
from storage.policy import storage_errors

Outcome = Frames | MediaError


def build_shard(task: Task, advance: Advance = lambda *_: None) -> FinishedShard:
    """Build one shard whole and publish it."""
    scratch = Path(task.scratch)
    failures: list[dict[str, Any]] = []
    rows = 0
    writing = ShardWriter(task.output, task.name, scratch, task.extra_columns)
    with storage_errors(task.scratch, "write to"), writing as writer:
        for number, (item, frames) in enumerate(in_order(packed(task, scratch), task.items)):
            if isinstance(frames, MediaError):
                failures.append({"source": item.source, "rows": item.rows, "reason": str(frames)})
                advance(0, 1, 0)
                continue
            writer.add(task.key(number), frames.jpegs, index_row(item, frames))
            rows += item.rows
            advance(1, 0, sum(map(len, frames.jpegs)))
        return writer.close(rows, failures)


def packed(task: Task, scratch: Path) -> Iterator[tuple[int, Outcome]]:
    """(item number, result) in order of arrival; a clip shared by several items is read once."""
    parts = [(number, *split_segment(item.source)) for number, item in enumerate(task.items)]
    files = [list(group) for _, group in itertools.groupby(parts, key=lambda part: part[1])]
    with Media(task.media_root, task.settings.media_type, scratch, task.fetching) as media:
        for index, found in media.fetched([file[0][1] for file in files]):
            if isinstance(found, MediaError):
                yield from ((number, found) for number, *_ in files[index])
                continue
            with opened(found) as data:
                for number, _, start, end in files[index]:
                    yield number, pack_media(data, task.settings, start, end)


def in_order(outcomes: Iterator[tuple[int, Outcome]], items: Sequence[Item]) -> Iterator[tuple[Item, Outcome]]:
    """Items with their outcomes, in the order of the items."""
    early: dict[int, Outcome] = {}
    due = 0
    for number, outcome in outcomes:
        early[number] = outcome
        while due in early:
            yield items[due], early.pop(due)
            due += 1


def pack_media(data: bytes | mmap.mmap, settings: ShardSettings, start: float, end: float) -> Outcome:
    """Convert one media; the reason when that fails."""
    try:
        if settings.media_type == "image":
            return pack_image(bytes(data), settings.size, settings.quality)
        return pack_video(data, settings.size, settings.quality, settings.fps, settings.max_frames, start, end)
    except MediaError as error:
        return error
    except Exception as error:  # decoders raise all sorts of things on damaged files; one file must not end a build
        return MediaError(f"cannot be decoded: {type(error).__name__}: {error}")


def index_row(item: Item, frames: Frames) -> dict[str, Any]:
    """A sample's index columns without those about its bytes; also its JSON in the tar."""
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
        **item.extra,
    }
