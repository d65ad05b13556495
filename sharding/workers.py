"""Builds one shard: reads its media, converts them, writes tar and index."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from sharding.annotations.items import Item, split_part
from sharding.media import Frames, MediaError, pack_image, pack_video
from sharding.plan import Task
from sharding.processes import Advance
from sharding.schema import join_url
from sharding.writing import FinishedShard, ShardWriter


def build_shard(task: Task, advance: Advance) -> FinishedShard:
    """Build one shard whole and publish it."""
    try:
        writer = ShardWriter(task.output, task.name, task.scratch)
        failures = []
        rows = 0
        for number, item in enumerate(task.items):
            try:
                frames = pack_media(item.source, task)
            except MediaError as error:
                failures.append({"source": item.source, "rows": item.rows, "reason": str(error)})
                advance(0, 1, 0)
                continue
            writer.add(task.key(number), frames.jpegs, index_row(item, frames))
            rows += item.rows
            advance(1, 0, sum(map(len, frames.jpegs)))
        return writer.close(rows, failures)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, join_url(task.output, task.name)) from None


def pack_media(source: str, task: Task) -> Frames:
    """Read and convert one media file; raises MediaError with the reason when that fails."""
    settings = task.settings
    try:
        if settings.media_type == "image":
            with fsspec.open(join_url(task.media_root, source), "rb") as file:
                data = file.read()
            return pack_image(data, settings.size, settings.quality)
        path, start, end = split_part(source)
        with clip_bytes(join_url(task.media_root, path)) as clip:
            return pack_video(clip, settings.size, settings.quality, settings.fps, settings.max_frames, start, end)
    except MediaError:
        raise
    except FileNotFoundError:
        raise MediaError("file not found") from None
    except OSError as error:
        raise MediaError(f"unreadable file: {error.strerror or error}") from None
    except Exception as error:  # decoders raise all sorts of things on damaged files; one file must not end a build
        raise MediaError(f"cannot be decoded: {type(error).__name__}: {error}") from None


@contextmanager
def clip_bytes(path: str) -> Iterator[bytes | mmap.mmap]:
    """A clip's bytes: mapped, where it is a local file, so that a long one costs no memory."""
    if "://" in path:
        with fsspec.open(path, "rb") as file:
            yield file.read()
        return
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


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
