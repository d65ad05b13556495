"""Bytes of single frames from local tars or fsspec URLs, and the shards' indices, a bounded number at a time."""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from loaders.index import Record, ShardIndex
from sharding.schema import Corpus, join_url, read_corpus, read_index

OPEN_SHARDS = 128
OPEN_TARS = 128  # at most: a process may have some 1,000 files open, and there are several corpora

Value = TypeVar("Value")


class BadSampleError(Exception):
    """A sample whose bytes cannot be used; the message is the reason that the log shows."""


class CorpusReader:
    """Reads one corpus: its indices and frames' bytes. Safe to use from several threads.

    open_shards: indices kept in memory; fewer than are in use at a time make it slow.
    """

    def __init__(self, url: str, options: dict[str, str] | None = None, open_shards: int = OPEN_SHARDS) -> None:
        self.options: dict[str, Any] = dict(options or {})
        self.corpus: Corpus = read_corpus(url, self.options)
        self.filesystem, self.root = fsspec.url_to_fs(self.corpus.tars or url, **self.options)
        self.local = isinstance(self.filesystem, LocalFileSystem)
        self._indices = LastUsed(self._load_index, open_shards)
        self._tars = LastUsed(self._open_tar, min(open_shards, OPEN_TARS))

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard, kept among the last used."""
        return self._indices.get(shard)

    def has_index(self, shard: int) -> bool:
        """Whether the index of a shard is in memory."""
        return shard in self._indices

    def read(self, wanted: Sequence[tuple[int, Record, np.ndarray]]) -> list[list[bytes] | BadSampleError]:
        """JPEG bytes of the chosen frames of several samples, given as (shard, record, frames).

        Each frame is read once, all ranges of remote shards at the same time, and checked against its CRC-32; what
        is missing or different is a BadSampleError in the sample's place.

        Raises:
            FileNotFoundError: a tar is missing. OSError: it cannot be read.
        """
        plans = [self._spans(shard, record, chosen) for shard, record, chosen in wanted]
        spans = [span for plan in plans if not isinstance(plan, BadSampleError) for span in plan.values()]
        data = iter(self.ranges(spans))
        found: list[list[bytes] | BadSampleError] = []
        for (_, record, chosen), plan in zip(wanted, plans, strict=True):
            if isinstance(plan, BadSampleError):
                found.append(plan)
                continue
            frames = dict(zip(plan, data))
            bad = [frame for frame in plan if zlib.crc32(frames[frame]) != int(record.crc32s[frame])]
            found.append(mismatch(frames, record, bad[0]) if bad else [frames[frame] for frame in chosen.tolist()])
        return found

    def _spans(
        self, shard: int, record: Record, chosen: np.ndarray
    ) -> dict[int, tuple[int, int, int]] | BadSampleError:
        """(shard, offset, size) of each distinct frame, or why the index cannot be right."""
        spans = {frame: (shard, int(record.offsets[frame]), int(record.sizes[frame])) for frame in chosen.tolist()}
        end = self.corpus.shards[shard].bytes
        for frame, (_, offset, size) in spans.items():
            if size <= 0 or offset < 0 or offset + size > end:
                return BadSampleError(f"frame {frame}: the index says {size} bytes at {offset} of a tar of {end}")
        return spans

    def ranges(self, spans: Sequence[tuple[int, int, int]]) -> list[bytes]:
        """The bytes at (shard, offset, size)."""
        if self.local:
            return [os.pread(self._tars.get(shard).descriptor, size, offset) for shard, offset, size in spans]
        paths = [join_url(self.root, self.corpus.shards[shard].name) for shard, _, _ in spans]
        starts, ends = [offset for _, offset, _ in spans], [offset + size for _, offset, size in spans]
        data = self.filesystem.cat_ranges(paths, starts, ends, on_error="return")
        for (shard, _, _), found in zip(spans, data, strict=True):
            if isinstance(found, FileNotFoundError):
                raise self._missing(shard)
            if isinstance(found, BaseException):
                url = self.corpus.tar_url(shard)
                raise OSError(f"{url} cannot be read: {type(found).__name__}: {found}") from found
        return data

    def _load_index(self, shard: int) -> ShardIndex:
        return ShardIndex(read_index(self.corpus, shard, self.options))

    def _open_tar(self, shard: int) -> OpenFile:
        try:
            return OpenFile(join_url(self.root, self.corpus.shards[shard].name))
        except FileNotFoundError:
            raise self._missing(shard) from None

    def _missing(self, shard: int) -> FileNotFoundError:
        return FileNotFoundError(
            f"{self.corpus.tar_url(shard)} is missing, though {self.corpus.url}/corpus.json lists it"
        )

    def close(self) -> None:
        """Close the open tars and forget the indices."""
        self._tars.clear()
        self._indices.clear()


def mismatch(frames: dict[int, bytes], record: Record, frame: int) -> BadSampleError:
    """What the log says of a frame whose bytes are not those that were packed."""
    size, wanted = len(frames[frame]), int(record.sizes[frame])
    return BadSampleError(
        f"frame {frame}: CRC-32 does not match the index" + (f" ({size} of {wanted} bytes)" if size != wanted else "")
    )


class OpenFile:
    """A file that closes when nobody uses it any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        """Close it."""
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class LastUsed(Generic[Value]):
    """The values of `make` for the last used `capacity` keys; threads that want the same one wait for one making."""

    def __init__(self, make: Callable[[int], Value], capacity: int) -> None:
        self._make, self._capacity = make, capacity
        self._values: OrderedDict[int, Value] = OrderedDict()
        self._making: dict[int, Future[Value]] = {}
        self._lock = threading.Lock()

    def get(self, key: int) -> Value:
        """The value of a key; an error of `make` is raised, and it is tried again the next time."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            future = self._making.get(key)
            mine = future is None
            if future is None:
                future = self._making[key] = Future()
        return self._fill(key, future) if mine else future.result()

    def _fill(self, key: int, future: Future[Value]) -> Value:
        try:
            value = self._make(key)
        except BaseException as error:
            with self._lock:
                del self._making[key]
            future.set_exception(error)
            raise
        with self._lock:
            del self._making[key]
            self._values[key] = value
            while len(self._values) > self._capacity:
                self._values.popitem(last=False)
        future.set_result(value)
        return value

    def __contains__(self, key: int) -> bool:
        return key in self._values

    def clear(self) -> None:
        """Forget all values."""
        with self._lock:
            self._values.clear()
