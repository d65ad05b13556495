"""Joining byte ranges: every part comes back whole, in few requests, and little is read in vain."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from storage.ranges import Request, Span, coalesce, cut

spans = st.lists(
    st.builds(Span, st.integers(0, 3), st.integers(0, 500), st.integers(1, 80)),
    max_size=40,
)


def contents(number: int) -> bytes:
    return np.random.default_rng(number).bytes(600)


@given(spans, st.integers(0, 60), st.integers(1, 300))
def test_every_part_comes_back_whole(wanted: list[Span], gap: int, limit: int) -> None:
    requests, holder = coalesce(wanted, gap, limit)
    data = [contents(request.object)[request.start : request.end] for request in requests]
    found = cut(wanted, requests, holder, data)
    assert found == [contents(span.object)[span.offset : span.offset + span.size] for span in wanted]


@given(spans, st.integers(0, 60), st.integers(1, 300))
def test_requests_stay_within_the_limit_and_are_joined_where_they_can(wanted: list[Span], gap: int, limit: int) -> None:
    requests, holder = coalesce(wanted, gap, limit)
    assert sorted(set(holder)) == list(range(len(requests)))
    largest = max((span.size for span in wanted), default=0)
    assert all(request.end - request.start <= max(limit, largest) for request in requests)
    ordered = sorted(requests, key=lambda request: (request.object, request.start))
    for first, second in pairwise(ordered):
        if first.object == second.object and second.start <= first.end + gap:
            assert second.end - first.start > limit  # only its size keeps it apart


@given(spans, st.integers(0, 60))
def test_nothing_is_read_in_vain_but_small_gaps(wanted: list[Span], gap: int) -> None:
    requests, _ = coalesce(wanted, gap, 10**9)
    read = {(r.object, byte) for r in requests for byte in range(r.start, r.end)}
    needed = {(s.object, byte) for s in wanted for byte in range(s.offset, s.offset + s.size)}
    assert needed <= read
    assert sum(r.end - r.start for r in requests) == len(read)  # no byte twice
    joined = len({(s.object, s.offset) for s in wanted}) - len(requests)
    assert len(read) - len(needed) <= gap * max(joined, 0)


def test_neighbours_share_a_request_and_others_do_not() -> None:
    wanted = [Span(0, 1000, 10), Span(0, 0, 10), Span(1, 0, 10), Span(0, 15, 10)]
    assert coalesce(wanted, 5, 100)[0] == [Request(0, 0, 25), Request(0, 1000, 1010), Request(1, 0, 10)]


def test_an_object_that_ends_early_gives_what_there_is() -> None:
    requests, holder = coalesce([Span(0, 0, 10), Span(0, 10, 10)], 0, 100)
    assert cut([Span(0, 0, 10), Span(0, 10, 10)], requests, holder, [b"0123456789ab"]) == [b"0123456789", b"ab"]
