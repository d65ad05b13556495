"""Which byte ranges to ask a store for, so that the parts that are wanted come in few requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """Bytes that are wanted: `size` of them from `offset` on in the object with that number."""

    object: int
    offset: int
    size: int


@dataclass(frozen=True)
class Request:
    """Bytes [start, end) of an object, in one request."""

    object: int
    start: int
    end: int


def coalesce(spans: Sequence[Span], gap: int, limit: int) -> tuple[list[Request], list[int]]:
    """Requests that cover all spans, and for each span the number of the one that holds it.

    Spans of one object that overlap, touch, or lie at most `gap` bytes apart share a request, as long as it stays
    within `limit` bytes; a span is never cut, so that a larger one is a request by itself.
    """
    order = sorted(range(len(spans)), key=lambda number: spans[number])
    requests: list[Request] = []
    holder = [0] * len(spans)
    for number in order:
        span = spans[number]
        end = span.offset + span.size
        last = requests[-1] if requests else None
        if last is not None and last.object == span.object and span.offset <= last.end + gap:
            together = max(last.end, end)
            if together == last.end or together - last.start <= limit:
                requests[-1] = Request(last.object, last.start, together)
                holder[number] = len(requests) - 1
                continue
        requests.append(Request(span.object, span.offset, end))
        holder[number] = len(requests) - 1
    return requests, holder


def cut(
    spans: Sequence[Span], requests: Sequence[Request], holder: Sequence[int], data: Sequence[bytes]
) -> list[bytes]:
    """Each span's bytes, from those that the requests brought; fewer where an object ended early."""
    found = []
    for span, number in zip(spans, holder, strict=True):
        first = span.offset - requests[number].start
        found.append(data[number][first : first + span.size])
    return found
