"""Remote shards kept on a node in blocks: each is fetched once, and gives the parts of it that are wanted."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future

from loaders.descriptions import content_name
from sharding.shards.schema import Corpus
from storage.cache import DiskCache
from storage.ranges import Span
from storage.remote import Part, Remote

BLOCK = 2**20  # bytes: one request for some hundred images, and a first batch that touches as many blocks comes soon
POLL = 0.02  # seconds between looks whether another process has fetched a block
OTHERS = 5.0  # seconds for which another process' fetching is waited for


class Blocks:
    """The shards of a corpus in blocks of BLOCK bytes, from the cache or else from the store. Safe for threads.

    counters: blocks_shared (got by waiting for another thread or process).
    """

    def __init__(self, cache: DiskCache, remote: Remote, corpus: Corpus) -> None:
        self.cache, self.remote, self.corpus = cache, remote, corpus
        self.counters: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._fetching: dict[str, Future[bytes | None]] = {}
        self._names = [
            content_name(corpus.tar_url(number), shard.bytes, shard.sha256)
            for number, shard in enumerate(corpus.shards)
        ]

    def read(self, spans: Sequence[Span]) -> list[bytes | None]:
        """The spans' bytes; None for those whose blocks find no room in the cache."""
        found = [self._cached(span) for span in spans]
        missing = [number for number, data in enumerate(found) if data is None]
        self.cache.counters["cache_hits"] += len(spans) - len(missing)
        self.cache.counters["cache_misses"] += len(missing)
        blocks = self._fetch(sorted({block for number in missing for block in blocks_of(spans[number])}))
        for number in missing:
            parts = [blocks[block] for block in blocks_of(spans[number])]
            if all(part is not None for part in parts):
                first = spans[number].offset % BLOCK
                found[number] = b"".join(part for part in parts if part is not None)[first:][: spans[number].size]
        return found

    def forget(self, spans: Sequence[Span]) -> None:
        """Remove the blocks of these spans: they hold damaged bytes."""
        self.cache.drop(sorted({self._name(block) for span in spans for block in blocks_of(span)}))

    def _cached(self, span: Span) -> bytes | None:
        parts = []
        for block in blocks_of(span):
            first = max(span.offset - block[1] * BLOCK, 0)
            end = min(span.offset + span.size - block[1] * BLOCK, BLOCK)
            part = self.cache.read(self._name(block), first, end - first)
            if part is None:
                return None
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _fetch(self, blocks: Sequence[tuple[int, int]]) -> dict[tuple[int, int], bytes | None]:
        """Each block's bytes, fetched by this thread or by another that has begun; None: there is no room for it."""
        mine: list[tuple[int, int]] = []
        waiting: dict[tuple[int, int], Future[bytes | None]] = {}
        with self._lock:
            for block in blocks:
                future = self._fetching.get(self._name(block))
                if future is None:
                    mine.append(block)
                    future = self._fetching[self._name(block)] = Future()
                waiting[block] = future
        self.counters["blocks_shared"] += len(blocks) - len(mine)
        try:
            self._fetch_mine(mine, waiting)
        finally:
            with self._lock:
                for block in mine:
                    del self._fetching[self._name(block)]
                    if not waiting[block].done():
                        waiting[block].set_result(None)  # whoever waits reads it another way, and meets the error
        return {block: future.result() for block, future in waiting.items()}

    def _fetch_mine(self, blocks: list[tuple[int, int]], futures: dict[tuple[int, int], Future[bytes | None]]) -> None:
        reserved = self.cache.reserve({self._name(block): self._size(block) for block in blocks}) if blocks else {}
        fetched = [block for block in blocks if reserved[self._name(block)]]
        try:
            data = self.remote.fetch([self._part(block) for block in fetched])
        except BaseException:
            self.cache.drop([self._name(block) for block in fetched])
            raise
        for block, found in zip(fetched, data, strict=True):
            futures[block].set_result(found)
            self.cache.put(self._name(block), found)
        for block in blocks:
            if not reserved[self._name(block)]:
                futures[block].set_result(self._from_others(block))

    def _from_others(self, block: tuple[int, int]) -> bytes | None:
        """A block that another process is fetching; None when it takes too long, or there is no room."""
        name, until = self._name(block), time.monotonic() + OTHERS
        while time.monotonic() < until:
            data = self.cache.read(name)
            if data is not None:
                self.counters["blocks_shared"] += 1
                return data
            if not self.cache.is_coming(name):
                return self.cache.read(name)
            time.sleep(POLL * (0.5 + random.random()))
        return None

    def _name(self, block: tuple[int, int]) -> str:
        return f"{self._names[block[0]]}-{block[1]}"

    def _size(self, block: tuple[int, int]) -> int:
        return min(BLOCK, self.corpus.shards[block[0]].bytes - block[1] * BLOCK)

    def _part(self, block: tuple[int, int]) -> Part:
        first = block[1] * BLOCK
        return Part(self.corpus.shards[block[0]].name, first, first + self._size(block))


def blocks_of(span: Span) -> list[tuple[int, int]]:
    """(object, number) of the blocks that hold a span."""
    last = (span.offset + span.size - 1) // BLOCK
    return [(span.object, number) for number in range(span.offset // BLOCK, last + 1)]
