"""The prefetcher: order, depth, errors and the end of its thread."""

import threading
import time

import pytest

from loaders.prefetch import Prefetcher


def test_items_come_in_order_and_at_most_depth_ahead() -> None:
    made = []

    def numbers():
        for number in range(20):
            made.append(number)
            yield number

    ahead = Prefetcher(numbers(), 3, "numbers")
    taken = []
    for number in ahead:
        taken.append(number)
        assert len(made) <= len(taken) + 4  # those in the queue, and the one in the thread's hand
    assert taken == list(range(20))
    ahead.close()


def test_an_error_is_raised_after_the_items_before_it() -> None:
    def numbers():
        yield 1
        raise ValueError("broken here")

    ahead = Prefetcher(numbers(), 2, "numbers")
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="broken here"):
        next(ahead)
    ahead.close()


def test_closing_ends_the_thread_and_the_source() -> None:
    closed = threading.Event()

    def numbers():
        try:
            while True:
                yield 1
        finally:
            closed.set()

    before = threading.active_count()
    ahead = Prefetcher(numbers(), 2, "numbers")
    next(ahead)
    ahead.close()
    assert closed.is_set()
    assert threading.active_count() <= before
    assert list(ahead) == []


def test_stopping_the_first_of_two_stages_ends_the_second() -> None:
    release = threading.Event()

    def slow():
        yield 1
        release.wait()
        yield 2

    first = Prefetcher(slow(), 1, "first")
    second = Prefetcher((number for number in first), 1, "second")
    assert next(second) == 1
    first.stop()
    second.close()  # does not wait for the slow source
    release.set()
    first.close()


def test_time_spent_waiting_is_counted() -> None:
    asked = threading.Semaphore(0)

    def slow():
        for number in range(3):
            asked.acquire()
            time.sleep(0.2)
            yield number

    ahead = Prefetcher(slow(), 1, "slow")
    began = time.perf_counter()
    for number in range(3):
        asked.release()
        assert next(ahead) == number
    assert 0.2 < ahead.waited < time.perf_counter() - began
    ahead.close()
