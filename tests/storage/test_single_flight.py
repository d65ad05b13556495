"""Values requested by several threads at the same time are made once."""

import threading
from collections import Counter

import pytest

from storage.single_flight import LastUsed


def test_several_threads_wait_for_one_value() -> None:
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


def test_the_next_call_tries_again_after_an_error() -> None:
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
