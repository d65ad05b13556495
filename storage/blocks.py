"""Remote objects cached on a node in blocks: each block is fetched once and serves all ranges in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from storage.cache import DiskCache
from storage.ranges import ByteRange, Store
from storage.single_flight import SingleFlight

BLOCK = 2**20  # bytes: large enough for a hundred images a request, small enough that the first batch is not delayed
WAIT_SECONDS = 5.0  # for a block that another process is fetching

Block = tuple[str, int]  # object, number of the block in it


class CachedStore:
    """Objects read through the cache, in blocks of BLOCK bytes. Safe for threads.

    counters: blocks_shared (got by waiting for another thread or process).
    """

    def __init__(self, store: Store, uncached: Store, cache: DiskCache, objects: Mapping[str, tuple[int, str]]) -> None:
        """objects: name -> (size, name in the cache). Ranges for which it has no room are read from `uncached`."""
        self.store, self.uncached, self.cache, self.objects = store, uncached, cache, objects
        self.counters: Counter[str] = Counter()
        self._flight: SingleFlight[Block, bytes | None] = SingleFlight()

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """The bytes of each range; see `Store`."""
        found = [self._cached(each) for each in ranges]
        missing = [number for number, data in enumerate(found) if data is None]
        self.cache.counters["cache_hits"] += len(ranges) - len(missing)
        self.cache.counters["cache_misses"] += len(missing)
        blocks = self._read_blocks([ranges[number] for number in missing])
        for number in missing:
            parts = [part for block in blocks_of(ranges[number]) if (part := blocks[block]) is not None]
            if len(parts) == len(blocks_of(ranges[number])):
                first = ranges[number].start % BLOCK
                found[number] = b"".join(parts)[first:][: ranges[number].size]
        missing = [number for number, data in enumerate(found) if data is None]
        for number, data in zip(missing, self.uncached.read_ranges([ranges[n] for n in missing]), strict=True):
            found[number] = data
        return [data for data in found if data is not None]

    def forget(self, ranges: Sequence[ByteRange]) -> None:
        """Remove the blocks of these ranges: they hold damaged bytes."""
        self.cache.drop(sorted({self._name(block) for each in ranges for block in blocks_of(each)}))

    def _cached(self, wanted: ByteRange) -> bytes | None:
        parts = []
        for block in blocks_of(wanted):
            first = max(wanted.start - block[1] * BLOCK, 0)
            end = min(wanted.start + wanted.size - block[1] * BLOCK, BLOCK)
            part = self.cache.read(self._name(block), first, end - first)
            if part is None:
                return None
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_blocks(self, ranges: Sequence[ByteRange]) -> dict[Block, bytes | None]:
        """The blocks of these ranges; None: no room in the cache, or another thread or process failed to fetch it."""
        blocks = sorted({block for each in ranges for block in blocks_of(each)})
        found, shared = self._flight.run(blocks, self._fetch)
        self.counters["blocks_shared"] += shared
        return found

    def _fetch(self, blocks: list[Block]) -> Iterator[tuple[Block, bytes | None]]:
        reserved = self.cache.reserve({self._name(block): self._range(block).size for block in blocks})
        own = [block for block in blocks if reserved[self._name(block)]]
        try:
            data = self.store.read_ranges([self._range(block) for block in own])
        except BaseException:
            self.cache.drop([self._name(block) for block in own])
            yield from ((block, None) for block in blocks)  # threads that wait read it themselves, and raise the error
            raise
        for block, found in zip(own, data, strict=True):
            yield block, found
            self.cache.put(self._name(block), found)
        for block in blocks:
            if not reserved[self._name(block)]:
                yield block, self._from_other_process(self._name(block))

    def _from_other_process(self, name: str) -> bytes | None:
        data = self.cache.wait_for(name, WAIT_SECONDS)
        self.counters["blocks_shared"] += data is not None
        return data

    def _name(self, block: Block) -> str:
        return f"{self.objects[block[0]][1]}-{block[1]}"

    def _range(self, block: Block) -> ByteRange:
        name, number = block
        return ByteRange(name, number * BLOCK, min((number + 1) * BLOCK, self.objects[name][0]))


def blocks_of(wanted: ByteRange) -> list[Block]:
    """The blocks that hold a range."""
    last = (wanted.start + wanted.size - 1) // BLOCK
    return [(wanted.name, number) for number in range(wanted.start // BLOCK, last + 1)]
