"""The processes that build shards: each takes whole shards, so that how many there are changes no byte."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import cv2
import fsspec

from sharding.annotations import Item, split_part
from sharding.media import Frames, MediaError, pack_image, pack_video
from sharding.plan import Task
from sharding.schema import join_url
from sharding.writing import FinishedShard, ShardWriter

Advance = Callable[[int, int], None]  # called with how many items were packed, how many failed

_counts: Any = None  # in a worker process: the counters it shares with the parent


def build_shards(tasks: list[Task], workers: int, advance: Advance) -> Iterator[tuple[int, FinishedShard]]:
    """(shard number, shard) of each task as it is finished, on that many processes.

    Raises:
        OSError: the output cannot be written, or a worker process died.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        for task in tasks:
            yield task.number, build_shard(task, advance)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sharding.workers"])
    counts = context.Array("q", 2)
    with ProcessPoolExecutor(workers, context, start_worker, (counts,)) as pool, ending_children():
        with interrupts_held_back():  # a worker that gets Ctrl-C would die noisily; this process ends them
            pending = {pool.submit(build_in_worker, task): task.number for task in tasks}
        seen = (0, 0)
        while pending:
            done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            now = (counts[0], counts[1])
            advance(now[0] - seen[0], now[1] - seen[1])
            seen = now
            for future in done:
                try:
                    yield pending.pop(future), future.result()
                except BrokenProcessPool:
                    raise ChildProcessError(
                        "a worker process died (out of memory, killed, or crashed in a decoder); finished shards "
                        "are kept: run the same command again to go on, with fewer --workers if memory is short"
                    ) from None


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block; processes started inside never get it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # new processes inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if caught:
        raise KeyboardInterrupt


@contextmanager
def ending_children() -> Iterator[None]:
    """End the processes started inside, at once, when an exception leaves the block."""
    others: set[BaseProcess] = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise


def start_worker(counts: Any) -> None:
    """Prepare a worker process: it ends with its parent, however that ends."""
    global _counts
    _counts = counts
    cv2.setNumThreads(1)  # there are as many processes as cores
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Wait for the parent process to end, then end this one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def build_in_worker(task: Task) -> FinishedShard:
    """`build_shard` in a worker process."""

    def advance(packed: int, failed: int) -> None:
        with _counts.get_lock():
            _counts[0] += packed
            _counts[1] += failed

    return build_shard(task, advance)


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
                advance(0, 1)
                continue
            writer.add(task.key(number), frames.jpegs, index_row(item, frames))
            rows += item.rows
            advance(1, 0)
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
