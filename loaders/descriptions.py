"""Descriptions and indices of remote corpora: fetched by one process of a node, for all of them."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sharding.shards.schema import Corpus, checksum_matches, corpus_at, description_url, no_corpus, no_index
from storage.cache import DiskCache, start_ticks
from storage.ranges import ByteRange
from storage.remote import RemoteStore
from storage.single_flight import process_lock
from storage.urls import join_url

log = logging.getLogger("loaders")

Item = TypeVar("Item")

FRESH = 600.0  # seconds for which a description may be handed from process to process
REFETCHES = 3  # of bytes that came damaged: a bad line may damage them more than once
FETCHERS = 8  # threads that fetch indices to the cache

LAST_READ: dict[str, float] = {}  # when this process has last read a description, by its name in the cache

IsIntact = Callable[[bytes], bool]


class SharedFiles:
    """`corpus.json` and the index files of one remote folder; without a cache each process fetches its own.

    A process that wants a file locks it while it looks and fetches, so that the others of the node find it in the
    cache; a lock ends with its process. Nobody waits longer than `remote.try_seconds` for another one.
    counters: files_shared (got by waiting for another process or thread), refetched (came damaged).
    """

    def __init__(self, folder: RemoteStore, cache: DiskCache | None) -> None:
        self.folder, self.cache = folder, cache
        self.counters: Counter[str] = Counter()
        self._cancelled = 0
        self._waiting: dict[int, tuple[str, float]] = {}

    def corpus(self, url: str) -> Corpus:
        """The description, not older than this process' last reading of it, or its start.

        Raises FileNotFoundError or ValueError when there is no corpus.
        """
        name = content_name(description_url(url), 0, "")
        since = LAST_READ.get(name) or process_began()
        try:
            data = self._read(ByteRange("corpus.json"), name, checksum_matches, since)
        except FileNotFoundError:
            raise no_corpus(url, self.folder.options) from None
        LAST_READ[name] = time.time()
        return corpus_at(url, data)

    def index(self, corpus: Corpus, shard: int) -> bytes:
        """A shard's index file. If it stays damaged, its reader raises the error."""
        info = corpus.shards[shard]
        wanted = ByteRange(info.index_name, 0, info.index_bytes)
        try:
            return self._read(
                wanted, index_name(corpus, shard), lambda data: hashlib.sha256(data).hexdigest() == info.index_sha256
            )
        except FileNotFoundError:
            raise no_index(corpus, shard) from None

    def bring_indices(self, corpus: Corpus, start: float) -> None:
        """Fetch all indices to the cache, several at a time; the first is the one at `start` in [0, 1) of them."""
        if self.cache is None or sum(shard.index_bytes for shard in corpus.shards) > self.cache.budget / 2:
            return
        absent = [n for n in range(len(corpus.shards)) if not self.cache.has(index_name(corpus, n))]
        if absent:
            with ThreadPoolExecutor(min(FETCHERS, len(absent)), thread_name_prefix="indices") as pool:
                list(pool.map(lambda shard: self.index(corpus, shard), rotated(absent, start)))

    def pending(self) -> list[str]:
        """Description of a file that another process downloads, for progress reports."""
        now = time.monotonic()
        return [
            f"{join_url(self.folder.url, name)}: {now - since:.1f} s, downloaded by another process of this node"
            for name, since in list(self._waiting.values())
        ]

    def cancel(self) -> None:
        """End the waiting for other processes; who waits gets CancelledError."""
        self._cancelled += 1

    def _read(self, wanted: ByteRange, name: str, is_intact: IsIntact, since: float | None = None) -> bytes:
        """A file: from the cache, if need be after another process has fetched it, or else from the store.

        since: its copy in the cache has a time stamp, and must have been fetched after that time.
        """
        if self.cache is None:
            return self._fetch_intact(wanted, is_intact)
        data = self._cached(self.cache, name, is_intact, since)
        if data is not None:
            return data
        cancelled, thread = self._cancelled, threading.get_ident()
        path = self.cache.folder / "locks" / name[:3]  # one of 4096 files, which files of different names may share
        self._waiting[thread] = wanted.name, time.monotonic()
        try:
            with process_lock(path, self.folder.settings.try_seconds, lambda: self._cancelled != cancelled) as waited:
                del self._waiting[thread]
                data = self._cached(self.cache, name, is_intact, since)
                if data is None:
                    return self._fetch(self.cache, wanted, name, is_intact, stamped=since is not None)
                self.counters["files_shared"] += waited
                return data
        finally:
            self._waiting.pop(thread, None)

    def _cached(self, cache: DiskCache, name: str, is_intact: IsIntact, since: float | None) -> bytes | None:
        data = cache.read(name)
        if data is not None and since is not None:
            stamp, _, data = data.partition(b"\n")
            if not is_fresh(stamp, since):
                return None
        return data if data is not None and is_intact(data) else None

    def _fetch(self, cache: DiskCache, wanted: ByteRange, name: str, is_intact: IsIntact, stamped: bool) -> bytes:
        """A file from the store, kept in the cache if there is room."""
        if cache.has(name):  # damaged, or too old
            cache.drop([name])
        kept = f"{time.time()!r}\n".encode() if stamped else b""
        data = self._fetch_intact(wanted, is_intact)
        kept += data
        if cache.reserve({name: len(kept)})[name]:
            cache.put(name, kept)
        return data

    def _fetch_intact(self, wanted: ByteRange, is_intact: IsIntact) -> bytes:
        """A file, downloaded again while it is damaged; after REFETCHES tries returned as it is."""
        (data,) = self.folder.read_ranges([wanted])
        for _ in range(REFETCHES):
            if is_intact(data):
                break
            self.counters["refetched"] += 1
            (data,) = self.folder.read_ranges([wanted])
        return data


def is_fresh(stamp: bytes, since: float) -> bool:
    """Whether a file with this time stamp was fetched after `since` and less than FRESH seconds ago."""
    now = time.time()
    try:
        return max(since, now - FRESH) <= float(stamp) <= now
    except ValueError:
        return False


def index_name(corpus: Corpus, shard: int) -> str:
    """An index file's name in the cache."""
    info = corpus.shards[shard]
    return content_name(corpus.index_url(shard), info.index_bytes, info.index_sha256)


def content_name(url: str, size: int, checksum: str) -> str:
    """A name for an object's contents: another object, or a rewritten one, has another name."""
    return hashlib.sha256(f"{url}\n{size}\n{checksum}".encode()).hexdigest()[:40]


def rotated(items: Sequence[Item], start: float) -> list[Item]:
    """The items from the one at `start` in [0, 1) on, and then the others."""
    first = int(start * len(items))
    return [*items[first:], *items[:first]]


def process_began() -> float:
    """The start time of this process on the clock of time.time()."""
    ticks = int(start_ticks(os.getpid())) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks)
