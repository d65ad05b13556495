"""Joining byte ranges: every range is complete, in few requests, with few unneeded bytes."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from storage.ranges import ByteRange, CoalescedStore, coalesce


def byte_range(number: int, start: int, size: int) -> ByteRange:
    return ByteRange(str(number), start, start + size)


ranges = st.lists(st.builds(byte_range, st.integers(0, 3), st.integers(0, 500), st.integers(1, 80)), max_size=40)


class Memory:
    """A store of objects of 600 bytes."""

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        return [np.random.default_rng(int(each.name)).bytes(600)[each.start : each.end] for each in ranges]


@given(ranges, st.integers(0, 60), st.integers(1, 300))
def test_every_range_is_complete(wanted: list[ByteRange], gap: int, limit: int) -> None:
    assert CoalescedStore(Memory(), gap, limit).read_ranges(wanted) == Memory().read_ranges(wanted)


@given(ranges, st.integers(0, 60), st.integers(1, 300))
def test_requests_are_joined_within_the_limit(wanted: list[ByteRange], gap: int, limit: int) -> None:
    requests, numbers = coalesce(wanted, gap, limit)
    assert sorted(set(numbers)) == list(range(len(requests)))
    largest = max((each.size for each in wanted), default=0)
    assert all(request.size <= max(limit, largest) for request in requests)
    for first, second in pairwise(sorted(requests)):
        if first.name == second.name and second.start <= first.start + first.size + gap:
            assert second.start + second.size - first.start > limit  # only the limit separates them


@given(ranges, st.integers(0, 60))
def test_only_small_gaps_are_read_unneeded(wanted: list[ByteRange], gap: int) -> None:
    requests, _ = coalesce(wanted, gap, 10**9)
    read = {(r.name, r.start + byte) for r in requests for byte in range(r.size)}
    needed = {(r.name, r.start + byte) for r in wanted for byte in range(r.size)}
    assert needed <= read
    assert sum(r.size for r in requests) == len(read)  # no byte twice
    joined = len({(r.name, r.start) for r in wanted}) - len(requests)
    assert len(read) - len(needed) <= gap * max(joined, 0)


def test_near_ranges_share_a_request_and_others_do_not() -> None:
    wanted = [byte_range(0, 1000, 10), byte_range(0, 0, 10), byte_range(1, 0, 10), byte_range(0, 15, 10)]
    assert coalesce(wanted, 5, 100)[0] == [byte_range(0, 0, 25), byte_range(0, 1000, 10), byte_range(1, 0, 10)]


def test_a_range_beyond_the_end_is_cut_short() -> None:
    wanted = [byte_range(0, 590, 10), byte_range(0, 600, 10)]
    assert [len(data) for data in CoalescedStore(Memory(), 0, 100).read_ranges(wanted)] == [10, 0]
