"""Descriptions and indices of remote corpora: fetched by one process of a node, for all of them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TypeVar

from sharding.shards.schema import (
    Corpus,
    ShardInfo,
    corpus_at,
    description_url,
    is_whole,
    join_url,
    no_corpus,
    no_index,
)
from storage.cache import DiskCache, started
from storage.ranges import ByteRange
from storage.remote import RemoteStore

log = logging.getLogger("loaders")

Item = TypeVar("Item")

POLL = 0.03  # seconds between looks whether another process has fetched a file
FRESH = 600.0  # seconds for which a description may be handed from process to process
REFETCHES = 3  # of bytes that came damaged: a bad line may spoil them more than once
FETCHERS = 8  # threads that bring indices to the cache

READ: dict[str, float] = {}  # when this process has last read a description, by its name in the cache


class SharedFiles:
    """`corpus.json` and the index files of one remote folder; without a cache each process fetches its own.

    A process that wants a file holds its lock while it looks and fetches, so that the others of the node find it in the
    cache; a lock ends with its process. Nobody waits longer than `remote.try_seconds` for another one.
    counters: files_shared (got by waiting for another process or thread), refetched (came damaged).
    """

    def __init__(self, folder: RemoteStore, cache: DiskCache | None) -> None:
        self.folder, self.cache = folder, cache
        self.counters: Counter[str] = Counter()
        self._cancelled = 0
        self._waiting: dict[int, tuple[str, float]] = {}

    def corpus(self, url: str) -> Corpus:
        """The description, as it was when this process read it last or began, or later.

        Raises FileNotFoundError or ValueError when there is no corpus.
        """
        name = content_name(description_url(url), 0, "")
        since = READ.get(name) or process_began()
        look, fetch = lambda: self._kept_description(name, since), lambda: self._fetch_description(name)
        try:
            data = self._once(name, "corpus.json", look, fetch)
        except FileNotFoundError:
            raise no_corpus(url, self.folder.options) from None
        READ[name] = time.time()
        return corpus_at(url, text_of(data))

    def index(self, corpus: Corpus, shard: int) -> bytes:
        """A shard's index file. Its reader says what is wrong with it when it stays damaged."""
        info = corpus.shards[shard]
        name = index_name(corpus, shard)
        look, fetch = lambda: self._kept_index(name, info.index_sha256), lambda: self._fetch_index(name, info)
        try:
            return self._once(name, info.index_name, look, fetch)
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
        """What is waited for that another process fetches."""
        now = time.monotonic()
        return [
            f"{join_url(self.folder.url, name)}: {now - since:.1f} s, for another process of this node"
            for name, since in list(self._waiting.values())
        ]

    def cancel(self) -> None:
        """End the waiting for other processes; who waits gets CancelledError."""
        self._cancelled += 1

    def _once(self, name: str, file: str, look: Callable[[], bytes | None], fetch: Callable[[], bytes]) -> bytes:
        """What `look` finds, now or after another process has fetched it, or else `fetch`."""
        data = look()
        if data is not None or self.cache is None:
            return fetch() if data is None else data
        with self._alone(name, file) as waited:
            data = look()
            if data is None:
                return fetch()
            self.counters["files_shared"] += waited
            return data

    @contextlib.contextmanager
    def _alone(self, name: str, file: str) -> Iterator[bool]:
        """Hold an item's lock, or have waited for it long enough; yields whether there was any waiting."""
        assert self.cache is not None
        lock = self._open_lock(name)
        if lock is None:
            yield False
            return
        before, began, waited = self._cancelled, time.monotonic(), False
        self._waiting[threading.get_ident()] = file, began
        try:
            while not try_lock(lock) and time.monotonic() - began < self.folder.settings.try_seconds:
                if self._cancelled != before:
                    raise CancelledError
                waited = True
                time.sleep(POLL * (0.5 + random.random()))
            del self._waiting[threading.get_ident()]
            yield waited
        finally:
            self._waiting.pop(threading.get_ident(), None)
            os.close(lock)  # and with it the lock

    def _open_lock(self, name: str) -> int | None:
        """One of 4096 files: two items may have the same, and then one waits for the other. None on a full disk."""
        assert self.cache is not None
        folder = self.cache.folder / "locks"
        try:
            folder.mkdir(exist_ok=True)
            return os.open(folder / name[:3], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            log.warning("%s cannot be used, each process fetches for itself (%s)", folder, error.strerror)
            return None

    def _kept_description(self, name: str, since: float) -> bytes | None:
        kept = self.cache.read(name) if self.cache is not None else None
        if kept is None:
            return None
        stamp, _, data = kept.partition(b"\n")
        now = time.time()
        try:
            fresh = max(since, now - FRESH) <= float(stamp) <= now
        except ValueError:
            return None
        return data if fresh and is_whole(text_of(data)) else None

    def _fetch_description(self, name: str) -> bytes:
        began = time.time()
        data = self._fetch_sound(ByteRange("corpus.json"), lambda data: is_whole(text_of(data)))
        if self.cache is not None:
            stamped = f"{began!r}\n".encode() + data
            self.cache.drop([name])
            if self.cache.reserve({name: len(stamped)})[name]:
                self.cache.put(name, stamped)
        return data

    def _kept_index(self, name: str, checksum: str) -> bytes | None:
        data = self.cache.read(name) if self.cache is not None else None
        if data is not None and hashlib.sha256(data).hexdigest() != checksum:
            assert self.cache is not None
            self.cache.drop([name])
            return None
        return data

    def _fetch_index(self, name: str, info: ShardInfo) -> bytes:
        reserved = self.cache is not None and self.cache.reserve({name: info.index_bytes})[name]
        try:
            data = self._fetch_sound(
                ByteRange(info.index_name, 0, info.index_bytes),
                lambda data: hashlib.sha256(data).hexdigest() == info.index_sha256,
            )
        except BaseException:
            if reserved and self.cache is not None:
                self.cache.drop([name])
            raise
        if reserved and self.cache is not None:
            self.cache.put(name, data)
        return data

    def _fetch_sound(self, part: ByteRange, is_sound: Callable[[bytes], bool]) -> bytes:
        """A file, fetched again when it comes damaged; after REFETCHES as it is."""
        (data,) = self.folder.read_ranges([part])
        for _ in range(REFETCHES):
            if is_sound(data):
                break
            self.counters["refetched"] += 1
            (data,) = self.folder.read_ranges([part])
        return data


def text_of(data: bytes) -> str:
    """A description's text, also of a damaged one."""
    return data.decode("utf-8", "replace")


def index_name(corpus: Corpus, shard: int) -> str:
    """An index file's name in the cache."""
    info = corpus.shards[shard]
    return content_name(corpus.index_url(shard), info.index_bytes, info.index_sha256)


def content_name(url: str, size: int, checksum: str) -> str:
    """A name for an object's contents: another object, or the same URL written anew, has another one."""
    return hashlib.sha256(f"{url}\n{size}\n{checksum}".encode()).hexdigest()[:40]


def rotated(items: Sequence[Item], start: float) -> list[Item]:
    """The items from the one at `start` in [0, 1) on, and then the others."""
    first = int(start * len(items))
    return [*items[first:], *items[:first]]


def try_lock(descriptor: int) -> bool:
    """Lock a file, unless another process or thread has it locked; where the file system has no locks, do without."""
    with contextlib.suppress(OSError):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def process_began() -> float:
    """When this process was started, as time.time() counts."""
    ticks = int(started(os.getpid())) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks)
