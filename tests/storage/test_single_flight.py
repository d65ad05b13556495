"""Values that several threads want at the same time are made once."""

import threading
from collections import Counter

import pytest

from storage.single_flight import LastUsed


def test_threads_that_want_the_same_value_wait_for_one_making() -> None:
    made: Counter[int] = Counter()
    begun = threading.Event()

    def make(key: int) -> str:
        made[key] += 1
        begun.wait(5)
        return f"value {key}"

    values = LastUsed(make, 2)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(values.get(1))) for _ in range(4)]
    for thread in threads:
        thread.start()
    begun.set()
    for thread in threads:
        thread.join()
    assert found == ["value 1"] * 4
    assert made == {1: 1}
    assert [values.get(2), values.get(3)] == ["value 2", "value 3"]
    assert 1 not in values


def test_a_making_that_fails_is_tried_again() -> None:
    answers = iter([OSError("not now"), "there"])

    def make(_: int) -> str:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    values = LastUsed(make, 2)
    with pytest.raises(OSError, match="not now"):
        values.get(0)
    assert values.get(0) == "there"
