"""Bytes of single frames from local tars or fsspec URLs, and the shards' indices, a bounded number at a time."""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from loaders.index import Record, ShardIndex
from sharding.schema import Corpus, join_url, read_corpus, read_index

OPEN_FILES = 64
OPEN_INDICES = 128


class BadSampleError(Exception):
    """A sample whose bytes cannot be used; the message is the reason that the log shows."""


class CorpusReader:
    """Reads one corpus: its indices and frames' bytes. Safe to use from several threads."""

    def __init__(self, url: str, options: dict[str, str] | None = None) -> None:
        self.options: dict[str, Any] = dict(options or {})
        self.corpus: Corpus = read_corpus(url, self.options)
        self.filesystem, self.root = fsspec.url_to_fs(url, **self.options)
        self.local = isinstance(self.filesystem, LocalFileSystem)
        self._files: OrderedDict[int, int] = OrderedDict()
        self._indices: OrderedDict[int, ShardIndex] = OrderedDict()
        self._lock = threading.Lock()

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard, kept among the last used."""
        with self._lock:
            index = self._indices.get(shard)
            if index is None:
                index = self._indices[shard] = ShardIndex(read_index(self.corpus, shard, self.options))
                while len(self._indices) > OPEN_INDICES:
                    self._indices.popitem(last=False)
            else:
                self._indices.move_to_end(shard)
        return index

    def frames(self, shard: int, record: Record, chosen: np.ndarray) -> list[bytes]:
        """JPEG bytes of the chosen frames, each read once and checked.

        Raises:
            BadSampleError: bytes are missing or do not match the index's CRC-32.
        """
        distinct = sorted(set(chosen.tolist()))
        spans = [(int(record.offsets[frame]), int(record.sizes[frame])) for frame in distinct]
        found = {}
        for frame, data in zip(distinct, self.ranges(shard, spans), strict=True):
            if zlib.crc32(data) != int(record.crc32s[frame]):
                short = f" ({len(data)} of {record.sizes[frame]} bytes)" if len(data) != record.sizes[frame] else ""
                raise BadSampleError(f"frame {frame}: CRC-32 does not match the index{short}")
            found[frame] = data
        return [found[frame] for frame in chosen.tolist()]

    def ranges(self, shard: int, spans: list[tuple[int, int]]) -> list[bytes]:
        """The bytes at (offset, size) of a shard's tar."""
        if self.local:
            with self._lock:  # a pread takes microseconds; the lock keeps the file from being closed meanwhile
                descriptor = self._open(shard)
                return [os.pread(descriptor, size, offset) for offset, size in spans]
        path = join_url(self.root, self.corpus.shards[shard].name)
        starts, ends = [offset for offset, _ in spans], [offset + size for offset, size in spans]
        return self.filesystem.cat_ranges([path] * len(spans), starts, ends, on_error="raise")

    def _open(self, shard: int) -> int:
        if shard not in self._files:
            path = join_url(self.root, self.corpus.shards[shard].name)
            try:
                self._files[shard] = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                raise FileNotFoundError(f"{path} is missing, though {self.corpus.url}/corpus.json lists it") from None
            while len(self._files) > OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]

    def close(self) -> None:
        """Close the open tars."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])
