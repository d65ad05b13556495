"""Bytes of single frames from local tars or fsspec URLs, and the shards' indices, a bounded number at a time."""

from __future__ import annotations

import logging
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loaders.config import LoaderConfig, check_storage
from loaders.descriptions import REFETCHES, SharedFiles, content_name
from loaders.index import Record, ShardIndex
from loaders.order.choices import BadSampleError
from runtime.errors import MissingError, UserError
from runtime.ranks import Ranks, current_ranks
from sharding.shards.schema import Corpus, named_shards, parse_index, read_corpus, read_index
from storage.blocks import CachedStore
from storage.cache import DiskCache
from storage.limits import RemoteReads, share_of, wait_for_turn
from storage.local import LocalStore
from storage.ranges import ByteRange, CoalescedStore, Store
from storage.remote import RemoteStore
from storage.single_flight import LastUsed
from storage.urls import check_no_credentials, is_local

log = logging.getLogger("loaders")

OPEN_SHARDS = 128
OPEN_TARS = 128  # at most: a process may have some 1,000 files open, and there are several corpora
LARGEST_REQUEST = 2**22  # bytes; neighbours are not joined beyond


class CorpusReader:
    """Reads one corpus: its indices and frames' bytes. Safe to use from several threads.

    open_shards: indices kept in memory; fewer than are in use at a time make it slow.
    remote: how this process may read a store. cache: where indices are kept, and shards of the media types in `keep`.
    Raises FileNotFoundError or ValueError when there is no corpus, or the URL or the options hold credentials.
    """

    def __init__(
        self,
        url: str,
        options: dict[str, str] | None = None,
        open_shards: int = OPEN_SHARDS,
        remote: RemoteReads | None = None,
        cache: DiskCache | None = None,
        keep: Sequence[str] = (),
    ) -> None:
        self.options: dict[str, Any] = dict(options or {})
        check_no_credentials(url, self.options)
        self.remote = remote or RemoteReads()
        self.cache = cache
        self._folder = self._connect(named_shards(url)[0])
        self._shared = None if self._folder is None else SharedFiles(self._folder, cache)
        try:
            self.corpus: Corpus = read_corpus(url, self.options) if self._shared is None else self._shared.corpus(url)
        except BaseException:
            if self._folder is not None:
                self._folder.close()
            raise
        tars = self.corpus.tars or self.corpus.url
        self._tar_folder = self._folder if tars == self.corpus.url else self._connect(tars)
        self.local = self._tar_folder is None
        self._uncached: Store = LocalStore(tars, min(open_shards, OPEN_TARS))
        self._cached: CachedStore | None = None
        if self._tar_folder is not None:
            self._uncached = CoalescedStore(self._tar_folder, self.remote.gap_kb * 1024, LARGEST_REQUEST)
            if cache is not None and self.corpus.media_type in keep:
                self._cached = CachedStore(self._tar_folder, self._uncached, cache, cached_objects(self.corpus))
        self._indices = LastUsed(self._load_index, open_shards)
        self._refetched = 0

    def _connect(self, url: str) -> RemoteStore | None:
        return None if is_local(url, self.options) else RemoteStore(url, self.options, self.remote)

    @property
    def keeps(self) -> bool:
        """Whether the shards' bytes are kept in the cache."""
        return self._cached is not None

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard, kept among the last used."""
        return self._indices.get(shard)

    def has_index(self, shard: int) -> bool:
        """Whether the index of a shard is in memory."""
        return shard in self._indices

    def read(self, wanted: Sequence[tuple[int, Record, np.ndarray]]) -> list[list[bytes] | BadSampleError]:
        """JPEG bytes of the chosen frames of several samples, given as (shard, record, frames).

        Each frame is read once, all those of remote shards at the same time, and checked against its CRC-32. What is
        different is fetched again from a store, up to REFETCHES times; what is missing or still different is a
        BadSampleError in the sample's place.

        Raises:
            FileNotFoundError: a tar is missing. OSError: it cannot be read.
        """
        plans = [self._spans(shard, record, chosen) for shard, record, chosen in wanted]
        spans = [span for plan in plans if not isinstance(plan, BadSampleError) for span in plan.values()]
        data = iter(self.read_ranges(spans))
        read = [{} if isinstance(plan, BadSampleError) else dict(zip(plan, data)) for plan in plans]
        for _ in range(0 if self.local else REFETCHES):
            damaged = [
                (number, frame)
                for number, frames in enumerate(read)
                for frame in frames
                if is_damaged(frames[frame], wanted[number][1], frame)
            ]
            if not damaged:
                break
            spans = [plans[number][frame] for number, frame in damaged]  # type: ignore[index]
            for (number, frame), data_again in zip(damaged, self._fetch_again(spans), strict=True):
                read[number][frame] = data_again
        found: list[list[bytes] | BadSampleError] = []
        for (_, record, chosen), plan, frames in zip(wanted, plans, read, strict=True):
            bad = next((frame for frame in frames if is_damaged(frames[frame], record, frame)), None)
            if isinstance(plan, BadSampleError):
                found.append(plan)
            else:
                found.append([frames[f] for f in chosen.tolist()] if bad is None else mismatch(frames, record, bad))
        return found

    def _spans(self, shard: int, record: Record, chosen: np.ndarray) -> dict[int, ByteRange] | BadSampleError:
        """Where each distinct frame is, or why the index cannot be right."""
        info, spans = self.corpus.shards[shard], {}
        for frame in chosen.tolist():
            offset, size = int(record.offsets[frame]), int(record.sizes[frame])
            if size <= 0 or offset < 0 or offset + size > info.bytes:
                return BadSampleError(
                    f"frame {frame}: the index says {size} bytes at {offset} of a tar of {info.bytes}"
                )
            spans[frame] = ByteRange(info.name, offset, offset + size)
        return spans

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """The bytes of ranges of the shards' tars."""
        try:
            return (self._cached or self._uncached).read_ranges(ranges)
        except FileNotFoundError as error:
            raise MissingError(f"{error}, though {self.corpus.url}/corpus.json lists it") from None

    def _fetch_again(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Bytes that came damaged, fetched again, and not from the cache."""
        self._refetched += len(ranges)
        if self._cached is not None:
            self._cached.forget(ranges)
        return self._uncached.read_ranges(ranges)

    def _load_index(self, shard: int) -> ShardIndex:
        if self._shared is None:
            return ShardIndex(read_index(self.corpus, shard, self.options))
        return ShardIndex(parse_index(self.corpus, shard, self._shared.index(self.corpus, shard)))

    def bring_indices(self, place: float) -> None:
        """Have all indices of a remote corpus brought to the node's cache, from the one at `place` in [0, 1) on."""
        if self._shared is not None:
            self._shared.bring_indices(self.corpus, place)

    def counters(self) -> Counter[str]:
        """What reading from a store and the cache took so far."""
        total = Counter({"refetched": self._refetched})
        for folder in {id(f): f for f in (self._folder, self._tar_folder) if f is not None}.values():
            total.update(folder.counters)
        if self._shared is not None:
            total.update(self._shared.counters)
        if self._cached is not None:
            total.update(self._cached.counters)
        if self.cache is not None:
            total.update(self.cache.counters)
        return total

    def pending(self) -> list[str]:
        """What of a store is being waited for."""
        folders = {id(folder): folder for folder in (self._folder, self._tar_folder) if folder is not None}
        shared = self._shared.pending() if self._shared is not None else []
        return [line for folder in folders.values() for line in folder.pending()] + shared

    def cancel(self) -> None:
        """End reads from a store that are under way: their callers get CancelledError."""
        for folder in (self._folder, self._tar_folder):
            if folder is not None:
                folder.cancel()
        if self._shared is not None:
            self._shared.cancel()

    def close(self) -> None:
        """Close files and connections, and forget the indices; reading opens them again."""
        for folder in (self._folder, self._tar_folder):
            if folder is not None:
                folder.close()
        if self.cache is not None:
            self.cache.close()
        if isinstance(self._uncached, LocalStore):
            self._uncached.close()
        self._indices.clear()


def open_corpus(
    url: str, config: LoaderConfig, open_shards: int = OPEN_SHARDS, ranks: Ranks | None = None
) -> CorpusReader:
    """A reader with the settings of a run; raises as CorpusReader, and ValueError for settings that cannot be meant.

    ranks: whose process this is; else as the environment tells.
    """
    check_storage(config)
    check_no_credentials(url, config.storage)
    ranks = ranks or current_ranks()
    cache = None
    keep: tuple[str, ...] = ("image", "video") if config.cache.clips else ("image",)
    if not is_local(url, config.storage):
        if config.cache.folder:
            cache = DiskCache(config.cache.folder, int(config.cache.gb * 1e9))
        else:
            cache, keep = index_cache(config.cache.index_mb), ()
        wait_for_turn(ranks, config.remote.starts_per_second)
    return CorpusReader(url, config.storage, open_shards, share_of(config.remote, ranks), cache, keep)


def describe(url: str, config: LoaderConfig) -> Corpus:
    """What a corpus holds; raises as `open_corpus`."""
    reader = open_corpus(url, config)
    reader.close()
    return reader.corpus


def index_cache(megabytes: int) -> DiskCache | None:
    """A cache in the temporary folder, of this user alone; None where there can be none, or it is not wanted."""
    folder = Path(tempfile.gettempdir()) / f"singularity-{os.getuid()}"
    if not megabytes:
        return None
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise ValueError(f"{folder} belongs to another user")
        return DiskCache(str(folder), megabytes * 2**20)
    except (OSError, ValueError) as error:
        log.info("indices are kept in no cache, each process fetches its own (%s)", error)
        return None


def check_cache(readers: Sequence[CorpusReader], config: LoaderConfig, stripes_here: int) -> None:
    """Raise ValueError when the cache cannot hold what a node's stripes are at; with less it would be read anew."""
    need = 0.0
    for reader in readers:
        shards = reader.corpus.shards
        if reader.keeps and shards:
            size = sum(shard.bytes + shard.index_bytes for shard in shards)
            need += min(1.0, stripes_here * (config.window_shards + 1) / len(shards)) * size
    if need > config.cache.gb * 1e9:
        raise UserError(
            f"cache.gb={config.cache.gb:g} is too little: {stripes_here} stripes of this node use {need / 1e9:.3g} GB "
            f"at a time (window_shards={config.window_shards}); raise cache.gb, or lower stripes or window_shards"
        )


def cached_objects(corpus: Corpus) -> dict[str, tuple[int, str]]:
    """Sizes and names in the cache of a corpus' tars, by name."""
    return {
        shard.name: (shard.bytes, content_name(corpus.tar_url(number), shard.bytes, shard.sha256))
        for number, shard in enumerate(corpus.shards)
    }


def is_damaged(data: bytes, record: Record, frame: int) -> bool:
    """Whether a frame's bytes are not those that were packed."""
    return zlib.crc32(data) != int(record.crc32s[frame])


def mismatch(frames: dict[int, bytes], record: Record, frame: int) -> BadSampleError:
    """What the log says of a frame whose bytes are not those that were packed."""
    size, wanted = len(frames[frame]), int(record.sizes[frame])
    return BadSampleError(
        f"frame {frame}: CRC-32 does not match the index" + (f" ({size} of {wanted} bytes)" if size != wanted else "")
    )
