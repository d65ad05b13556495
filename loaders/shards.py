"""Reads a packed corpus: the indices of its shards, and the bytes of single frames, from disks or stores."""

from __future__ import annotations

import logging
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loaders.columns import ExtraColumns
from loaders.config import LoaderConfig, check_storage
from loaders.descriptions import REFETCHES, SharedFiles, content_name
from loaders.index import Record, ShardIndex
from loaders.samples import RawSample, SampleSpec
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
    extra: columns of the indices that samples come with.
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
        extra: ExtraColumns | None = None,
    ) -> None:
        self.options: dict[str, Any] = dict(options or {})
        check_no_credentials(url, self.options)
        self.remote = remote or RemoteReads()
        self.cache, self._extra = cache, extra or ExtraColumns(())
        self._indices = LastUsed(self._load_index, open_shards)
        self._stores: list[RemoteStore] = []  # that are open
        folder = self._connect(named_shards(url)[0])
        self._shared = None if folder is None else SharedFiles(folder, cache)
        try:
            self.corpus: Corpus = read_corpus(url, self.options) if self._shared is None else self._shared.corpus(url)
        except BaseException:
            for store in self._stores:
                store.close()
            raise
        tars = self.corpus.tars or self.corpus.url
        remote_tars = folder if tars == self.corpus.url else self._connect(tars)
        self.local = remote_tars is None
        self._uncached: Store = LocalStore(tars, min(open_shards, OPEN_TARS))
        self._cached: CachedStore | None = None
        if remote_tars is not None:
            self._uncached = CoalescedStore(remote_tars, self.remote.gap_kb * 1024, LARGEST_REQUEST)
            if cache is not None and self.corpus.media_type in keep:
                self._cached = CachedStore(remote_tars, self._uncached, cache, cached_objects(self.corpus))
        self._refetched = 0

    def _connect(self, url: str) -> RemoteStore | None:
        if is_local(url, self.options):
            return None
        self._stores.append(RemoteStore(url, self.options, self.remote))
        return self._stores[-1]

    @property
    def keeps(self) -> bool:
        """Whether the bytes of shards are cached."""
        return self._cached is not None

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard; the last used ones stay in memory."""
        return self._indices.get(shard)

    def has_index(self, shard: int) -> bool:
        """Whether the index of a shard is in memory."""
        return shard in self._indices

    def read(self, specs: Sequence[SampleSpec]) -> list[RawSample]:
        """JPEG bytes of the frames of several samples, or the reason why there are none.

        Each frame is read once, all those of remote shards at the same time, and checked against its CRC-32. Damaged
        ones are fetched again from a store, up to REFETCHES times; a sample with one that stays damaged is a bad one.
        Raises FileNotFoundError: a tar is missing. OSError: it cannot be read.
        """
        reasons = [spec.reason or self._misplaced(spec) for spec in specs]
        wanted = [
            (row, frame)
            for row, spec in enumerate(specs)
            if not reasons[row]
            for frame in dict.fromkeys(spec.frames.tolist())
        ]
        ranges = [self._range(specs[row].record, frame) for row, frame in wanted]
        found = dict(zip(wanted, self.read_ranges(ranges), strict=True))
        damaged = wanted
        for tries_left in reversed(range(1 if self.local else REFETCHES + 1)):
            damaged = [
                (row, frame)
                for row, frame in damaged
                if zlib.crc32(found[row, frame]) != int(specs[row].record.crc32s[frame])
            ]
            if damaged and tries_left:
                data = self._fetch_again([self._range(specs[row].record, frame) for row, frame in damaged])
                found.update(zip(damaged, data, strict=True))
        for row, frame in reversed(damaged):
            size, got = int(specs[row].record.sizes[frame]), len(found[row, frame])
            cut = f" ({got} of {size} bytes)" if got != size else ""
            reasons[row] = f"frame {frame}: CRC-32 does not match the index{cut}"
        return [
            RawSample(spec, [] if reasons[row] else [found[row, frame] for frame in spec.frames.tolist()], reasons[row])
            for row, spec in enumerate(specs)
        ]

    def _range(self, record: Record, frame: int) -> ByteRange:
        first = int(record.offsets[frame])
        return ByteRange(self.corpus.shards[record.shard].name, first, first + int(record.sizes[frame]))

    def _misplaced(self, spec: SampleSpec) -> str:
        """Why the index cannot be right about where a sample's frames are."""
        record, end = spec.record, self.corpus.shards[spec.record.shard].bytes
        for frame in spec.frames.tolist():
            offset, size = int(record.offsets[frame]), int(record.sizes[frame])
            if size <= 0 or offset < 0 or offset + size > end:
                return f"frame {frame}: the index has {size} bytes at {offset} of a tar of {end}"
        return ""

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
            table = read_index(self.corpus, shard, self.options)
        else:
            table = parse_index(self.corpus, shard, self._shared.index(self.corpus, shard))
        return ShardIndex(table, shard, self._extra.of(table, self.corpus.index_url(shard)))

    def bring_indices(self, start: float) -> None:
        """Have all indices of a remote corpus brought to the node's cache, from the one at `start` in [0, 1) on."""
        if self._shared is not None:
            self._shared.bring_indices(self.corpus, start)

    def counters(self) -> Counter[str]:
        """Counters of reads from a store and the cache."""
        total = Counter({"refetched": self._refetched})
        for part in (*self._stores, self._shared, self._cached, self.cache):
            if part is not None:
                total.update(part.counters)
        return total

    def pending(self) -> list[str]:
        """Description of the pending reads of a store."""
        shared = self._shared.pending() if self._shared is not None else []
        return [line for store in self._stores for line in store.pending()] + shared

    def cancel(self) -> None:
        """End reads from a store that are under way: their callers get CancelledError."""
        for store in self._stores:
            store.cancel()
        if self._shared is not None:
            self._shared.cancel()

    def close(self) -> None:
        """Close files and connections, and forget the indices; reading opens them again."""
        for store in self._stores:
            store.close()
        if self.cache is not None:
            self.cache.close()
        if isinstance(self._uncached, LocalStore):
            self._uncached.close()
        self._indices.clear()


def open_corpus(
    url: str,
    config: LoaderConfig,
    open_shards: int = OPEN_SHARDS,
    ranks: Ranks | None = None,
    extra: ExtraColumns | None = None,
) -> CorpusReader:
    """A reader with the settings of a run; raises as CorpusReader, and UserError for settings without a meaning.

    ranks: of this process; by default from the environment. extra: see CorpusReader; those of `config` are training's.
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
    return CorpusReader(url, config.storage, open_shards, share_of(config.remote, ranks), cache, keep, extra)


def describe(url: str, config: LoaderConfig) -> Corpus:
    """The description of a corpus; raises as `open_corpus`."""
    reader = open_corpus(url, config)
    reader.close()
    return reader.corpus


def index_cache(megabytes: int) -> DiskCache | None:
    """A cache in the temporary folder, of this user alone; None where it is turned off or cannot be made."""
    folder = Path(tempfile.gettempdir()) / f"singularity-{os.getuid()}"
    if not megabytes:
        return None
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise ValueError(f"{folder} belongs to another user")
        return DiskCache(str(folder), megabytes * 2**20)
    except (OSError, ValueError) as error:
        log.info("indices are not cached, each process downloads its own (%s)", error)
        return None


def check_cache(readers: Sequence[CorpusReader], config: LoaderConfig, stripes_here: int) -> None:
    """Raise UserError if the cache is smaller than what the stripes of a node read at a time, so it would never hit."""
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
