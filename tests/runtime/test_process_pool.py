"""Tasks in worker processes: each runs once, errors and dead workers are reported, progress is counted."""

import os
import signal
import time
import weakref
from collections.abc import Iterator

import pytest

from runtime.process_pool import Advance, run_tasks


def square(number: int, advance: Advance) -> int:
    advance(1, 0, number)
    return number * number


def die_at_seven(number: int, advance: Advance) -> int:
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return square(number, advance)


def fail_at_seven(number: int, advance: Advance) -> int:
    if number == 7:
        raise ValueError("seven")
    return square(number, advance)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_task_runs_once_and_tasks_are_taken_as_needed(workers: int) -> None:
    drawn, counted = [], [0, 0, 0]

    def tasks():
        for number in range(50):
            drawn.append(number)
            yield number

    def advance(*more: int) -> None:
        counted[:] = [old + new for old, new in zip(counted, more)]

    results = {}
    for task, result in run_tasks(square, tasks(), workers, advance):
        results[task] = result
        assert len(drawn) <= len(results) + 2 * workers
    assert results == {number: number * number for number in range(50)}
    assert counted == [50, 0, sum(range(50))]


def test_a_dead_worker_is_an_error_with_the_remedy() -> None:
    with pytest.raises(ChildProcessError, match=r"a worker process died .* run the same command again"):
        list(run_tasks(die_at_seven, range(20), 2, lambda *_: None))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_task_is_raised_unchanged(workers: int) -> None:
    with pytest.raises(ValueError, match="seven"):
        list(run_tasks(fail_at_seven, range(20), workers, lambda *_: None))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_is_not_lost_in_the_callback_of_a_weak_reference() -> None:
    class Thing:
        pass

    def callback(_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)  # the KeyboardInterrupt is raised here, and Python drops it

    thing = Thing()
    reference = weakref.ref(thing, callback)
    things, drawn = [thing], []
    del thing

    def tasks() -> Iterator[int]:
        for number in range(2000):
            drawn.append(number)
            if number == 20:
                things.clear()
            yield number

    with pytest.raises(KeyboardInterrupt):
        list(run_tasks(square, tasks(), 2, lambda *_: None))
    assert reference() is None
    assert len(drawn) < 2000
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
