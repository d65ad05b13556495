"""Byte ranges, the interface of every store, and the joining of nearby ranges into one request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class ByteRange(NamedTuple):
    """Bytes [start, end) of an object; the whole object if there is no end."""

    name: str  # below the URL of the store
    start: int = 0
    end: int | None = None

    @property
    def size(self) -> int:
        """Number of bytes of a range that has an end."""
        assert self.end is not None
        return self.end - self.start

    def __str__(self) -> str:
        return self.name if self.end is None else f"{self.name} bytes {self.start}-{self.end - 1}"


class Store(Protocol):
    """Objects below a URL: a local folder, a remote store, or a layer around another store."""

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """The bytes of each range, read concurrently; fewer where an object ends before.

        Raises:
            FileNotFoundError, PermissionError, OSError: one of them cannot be read. TimeoutError: not in time.
        """


class CoalescedStore:
    """A layer that joins nearby ranges into one request to another store."""

    def __init__(self, store: Store, gap: int, limit: int) -> None:
        """gap, limit: see `coalesce`."""
        self.store, self.gap, self.limit = store, gap, limit

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """The bytes of each range; see `Store`."""
        requests, numbers = coalesce(ranges, self.gap, self.limit)
        data = self.store.read_ranges(requests)
        found = []
        for each, number in zip(ranges, numbers, strict=True):
            first = each.start - requests[number].start
            found.append(data[number][first : first + each.size])
        return found


def coalesce(ranges: Sequence[ByteRange], gap: int, limit: int) -> tuple[list[ByteRange], list[int]]:
    """Requests that cover all ranges, and for each range the index of its request.

    Ranges of one object that overlap, touch, or lie at most `gap` bytes apart share a request, as long as it stays
    within `limit` bytes; a range is never split, so that a larger one is a request by itself.
    """
    requests: list[ByteRange] = []
    numbers = [0] * len(ranges)
    for index in sorted(range(len(ranges)), key=lambda index: ranges[index]):
        name, start, size = ranges[index].name, ranges[index].start, ranges[index].size
        if requests and requests[-1].name == name and start <= requests[-1].start + requests[-1].size + gap:
            first, last = requests[-1].start, requests[-1].start + requests[-1].size
            end = max(last, start + size)
            if end == last or end - first <= limit:
                requests[-1] = ByteRange(name, first, end)
                numbers[index] = len(requests) - 1
                continue
        requests.append(ranges[index])
        numbers[index] = len(requests) - 1
    return requests, numbers
