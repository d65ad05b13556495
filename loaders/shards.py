"""Bytes of single frames from local tars or fsspec URLs, and the shards' indices, a bounded number at a time."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic, TypeVar

import fsspec

from loaders.config import LoaderConfig, RemoteReads, check_storage
from loaders.descriptions import REFETCHES, SharedFiles
from loaders.index import ShardIndex
from loaders.samples import RawSample, SampleSpec
from runtime.errors import MissingError, UserError
from sharding.shards.schema import Corpus, join_url, named_shards, parse_index, read_corpus, read_index
from storage.blocks import Blocks
from storage.cache import DiskCache
from storage.failures import check_no_credentials
from storage.node import Node, share_of, this_node, wait_for_turn
from storage.ranges import Span, coalesce, cut
from storage.remote import Part, Remote, is_local

log = logging.getLogger("loaders")

OPEN_SHARDS = 128
OPEN_TARS = 128  # at most: a process may have some 1,000 files open, and there are several corpora
LARGEST_REQUEST = 2**22  # bytes; neighbours are not joined beyond

Value = TypeVar("Value")


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
        self._blocks: Blocks | None = None
        if self._tar_folder is not None and cache is not None and self.corpus.media_type in keep:
            self._blocks = Blocks(cache, self._tar_folder, self.corpus)
        self._root = fsspec.url_to_fs(tars, **self.options)[1]
        self._indices = LastUsed(self._load_index, open_shards)
        self._tars = LastUsed(self._open_tar, min(open_shards, OPEN_TARS))
        self._refetched = 0

    def _connect(self, url: str) -> Remote | None:
        return None if is_local(url, self.options) else Remote(url, self.options, self.remote)

    @property
    def keeps(self) -> bool:
        """Whether the shards' bytes are kept in the cache."""
        return self._blocks is not None

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard, kept among the last used."""
        return self._indices.get(shard)

    def has_index(self, shard: int) -> bool:
        """Whether the index of a shard is in memory."""
        return shard in self._indices

    def read(self, specs: Sequence[SampleSpec]) -> list[RawSample]:
        """JPEG bytes of the frames of several samples, or why there are none.

        Each frame is read once, all those of remote shards at the same time, and checked against its CRC-32. Damaged
        ones are fetched again from a store, up to REFETCHES times; a sample with one that stays damaged is a bad one.

        Raises:
            FileNotFoundError: a tar is missing. OSError: it cannot be read.
        """
        reasons = [spec.reason or self._misplaced(spec) for spec in specs]
        wanted = [
            (row, frame)
            for row, spec in enumerate(specs)
            if not reasons[row]
            for frame in dict.fromkeys(spec.frames.tolist())
        ]
        found = dict(zip(wanted, self.ranges([span(specs[row], frame) for row, frame in wanted]), strict=True))
        damaged = wanted
        for tries_left in reversed(range(1 if self.local else REFETCHES + 1)):
            damaged = [(row, frame) for row, frame in damaged if is_damaged(found[row, frame], specs[row], frame)]
            if damaged and tries_left:
                data = self._fetch_again([span(specs[row], frame) for row, frame in damaged])
                found.update(zip(damaged, data, strict=True))
        for row, frame in reversed(damaged):
            reasons[row] = mismatch(found[row, frame], specs[row], frame)
        return [
            RawSample(spec, [] if reasons[row] else [found[row, frame] for frame in spec.frames.tolist()], reasons[row])
            for row, spec in enumerate(specs)
        ]

    def _misplaced(self, spec: SampleSpec) -> str:
        """Why the index cannot be right about where a sample's frames are."""
        end = self.corpus.shards[spec.record.shard].bytes
        for frame in spec.frames.tolist():
            _, offset, size = span(spec, frame)
            if size <= 0 or offset < 0 or offset + size > end:
                return f"frame {frame}: the index says {size} bytes at {offset} of a tar of {end}"
        return ""

    def ranges(self, spans: Sequence[Span]) -> list[bytes]:
        """The bytes at (shard, offset, size)."""
        if self.local:
            return self._from_disk(spans)
        try:
            if self._blocks is None:
                return self._fetch(spans)
            found = self._blocks.read(spans)
            missing = [number for number, data in enumerate(found) if data is None]
            for number, data in zip(missing, self._fetch([spans[number] for number in missing]), strict=True):
                found[number] = data
            return [data for data in found if data is not None]
        except FileNotFoundError as error:
            raise self._missing(str(error)) from None

    def _from_disk(self, spans: Sequence[Span]) -> list[bytes]:
        """The spans' bytes from local tars; the disk is told of all of them first, so that it works at many at once."""
        files = [self._tars.get(shard) for shard, _, _ in spans]
        for file, (_, offset, size) in zip(files, spans, strict=True):
            os.posix_fadvise(file.descriptor, offset, size, os.POSIX_FADV_WILLNEED)
        return [os.pread(file.descriptor, size, offset) for file, (_, offset, size) in zip(files, spans, strict=True)]

    def _fetch(self, spans: Sequence[Span]) -> list[bytes]:
        """The spans' bytes from the store, in as few requests as their distances allow."""
        assert self._tar_folder is not None
        requests, holder = coalesce(spans, self.remote.gap_kb * 1024, LARGEST_REQUEST)
        names = [self.corpus.shards[request.object].name for request in requests]
        parts = [Part(name, request.start, request.end) for name, request in zip(names, requests, strict=True)]
        return cut(spans, requests, holder, self._tar_folder.fetch(parts))

    def _fetch_again(self, spans: Sequence[Span]) -> list[bytes]:
        """Bytes that came damaged, fetched again, and not from the cache."""
        self._refetched += len(spans)
        if self._blocks is not None:
            self._blocks.forget(spans)
        return self._fetch(spans)

    def _load_index(self, shard: int) -> ShardIndex:
        if self._shared is None:
            return ShardIndex(read_index(self.corpus, shard, self.options), shard)
        return ShardIndex(parse_index(self.corpus, shard, self._shared.index(self.corpus, shard)), shard)

    def bring_indices(self, start: float) -> None:
        """Have all indices of a remote corpus brought to the node's cache, from the one at `start` in [0, 1) on."""
        if self._shared is not None:
            self._shared.bring_indices(self.corpus, start)

    def _open_tar(self, shard: int) -> OpenFile:
        try:
            return OpenFile(join_url(self._root, self.corpus.shards[shard].name))
        except FileNotFoundError:
            raise self._missing(f"{self.corpus.tar_url(shard)} is missing") from None

    def _missing(self, what: str) -> MissingError:
        return MissingError(f"{what}, though {self.corpus.url}/corpus.json lists it")

    def counters(self) -> Counter[str]:
        """What reading from a store and the cache took so far."""
        total = Counter({"refetched": self._refetched})
        for folder in {id(f): f for f in (self._folder, self._tar_folder) if f is not None}.values():
            total.update(folder.counters)
        if self._shared is not None:
            total.update(self._shared.counters)
        if self._blocks is not None:
            total.update(self._blocks.counters)
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
        self._tars.clear()
        self._indices.clear()


def open_corpus(
    url: str, config: LoaderConfig, open_shards: int = OPEN_SHARDS, node: Node | None = None
) -> CorpusReader:
    """A reader with the settings of a run; raises as CorpusReader, and ValueError for settings that cannot be meant.

    node: whose process this is; else as the environment tells.
    """
    check_storage(config)
    check_no_credentials(url, config.storage)
    node = node or this_node()
    cache = None
    keep: tuple[str, ...] = ("image", "video") if config.cache.clips else ("image",)
    if not is_local(url, config.storage):
        if config.cache.folder:
            cache = DiskCache(config.cache.folder, int(config.cache.gb * 1e9))
        else:
            cache, keep = index_cache(config.cache.index_mb), ()
        wait_for_turn(node, config.remote.starts_per_second)
    return CorpusReader(url, config.storage, open_shards, share_of(config.remote, node), cache, keep)


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


def span(spec: SampleSpec, frame: int) -> Span:
    """Where a frame of a sample is."""
    record = spec.record
    return Span(record.shard, int(record.offsets[frame]), int(record.sizes[frame]))


def is_damaged(data: bytes, spec: SampleSpec, frame: int) -> bool:
    """Whether a frame's bytes are not those that were packed."""
    return zlib.crc32(data) != int(spec.record.crc32s[frame])


def mismatch(data: bytes, spec: SampleSpec, frame: int) -> str:
    """What the log says of a frame whose bytes are not those that were packed."""
    size = int(spec.record.sizes[frame])
    cut = f" ({len(data)} of {size} bytes)" if len(data) != size else ""
    return f"frame {frame}: CRC-32 does not match the index{cut}"


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
