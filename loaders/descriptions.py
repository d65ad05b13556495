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
REFETCHES = 3  # of bytes that came damaged: a bad line may damage them more than once
FETCHERS = 8  # threads that fetch indices to the cache

LAST_READ: dict[str, float] = {}  # when this process has last read a description, by its name in the cache

IsSound = Callable[[bytes], bool]


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
            data = self._read(ByteRange("corpus.json"), name, lambda data: is_whole(text_of(data)), since)
        except FileNotFoundError:
            raise no_corpus(url, self.folder.options) from None
        LAST_READ[name] = time.time()
        return corpus_at(url, text_of(data))

    def index(self, corpus: Corpus, shard: int) -> bytes:
        """A shard's index file. Its reader says what is wrong with it when it stays damaged."""
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
        """What is waited for that another process fetches."""
        now = time.monotonic()
        return [
            f"{join_url(self.folder.url, name)}: {now - since:.1f} s, for another process of this node"
            for name, since in list(self._waiting.values())
        ]

    def cancel(self) -> None:
        """End the waiting for other processes; who waits gets CancelledError."""
        self._cancelled += 1

    def _read(self, wanted: ByteRange, name: str, is_sound: IsSound, since: float | None = None) -> bytes:
        """A file: from the cache, if need be after another process has fetched it, or else from the store.

        since: its copy in the cache has a time stamp, and must have been fetched after that time.
        """
        data = self._cached(name, is_sound, since)
        if data is not None:
            return data
        with self._locked(name, wanted.name) as waited:
            data = self._cached(name, is_sound, since)
            if data is None:
                return self._fetch(wanted, name, is_sound, stamped=since is not None)
            self.counters["files_shared"] += waited
            return data

    def _cached(self, name: str, is_sound: IsSound, since: float | None) -> bytes | None:
        data = self.cache.read(name) if self.cache is not None else None
        if data is not None and since is not None:
            stamp, _, data = data.partition(b"\n")
            if not is_fresh(stamp, since):
                return None
        return data if data is not None and is_sound(data) else None

    def _fetch(self, wanted: ByteRange, name: str, is_sound: IsSound, stamped: bool) -> bytes:
        """A file from the store, kept in the cache if there is room."""
        if self.cache is None:
            return self._fetch_sound(wanted, is_sound)
        if self.cache.has(name):  # damaged, or too old
            self.cache.drop([name])
        kept = f"{time.time()!r}\n".encode() if stamped else b""
        data = self._fetch_sound(wanted, is_sound)
        kept += data
        if self.cache.reserve({name: len(kept)})[name]:
            self.cache.put(name, kept)
        return data

    def _fetch_sound(self, wanted: ByteRange, is_sound: IsSound) -> bytes:
        """A file, fetched again when it comes damaged; after REFETCHES as it is."""
        (data,) = self.folder.read_ranges([wanted])
        for _ in range(REFETCHES):
            if is_sound(data):
                break
            self.counters["refetched"] += 1
            (data,) = self.folder.read_ranges([wanted])
        return data

    @contextlib.contextmanager
    def _locked(self, name: str, file: str) -> Iterator[bool]:
        """Hold a file's lock, or have waited for it long enough; yields whether there was any waiting."""
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
        """One of 4096 lock files, which files of different names may share. None without a cache, or on a full disk."""
        if self.cache is None:
            return None
        folder = self.cache.folder / "locks"
        try:
            folder.mkdir(exist_ok=True)
            return os.open(folder / name[:3], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            log.warning("%s cannot be used, each process fetches for itself (%s)", folder, error.strerror)
            return None


def is_fresh(stamp: bytes, since: float) -> bool:
    """Whether a file with this time stamp was fetched after `since` and less than FRESH seconds ago."""
    now = time.time()
    try:
        return max(since, now - FRESH) <= float(stamp) <= now
    except ValueError:
        return False


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
