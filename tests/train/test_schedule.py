"""The learning rate at each step: warm-up, cosine, floor, and the end."""

import pytest

from train.schedule import Schedule


def test_it_warms_up_from_the_floor_and_decays_to_it():
    schedule = Schedule(warmup_steps=10, total_steps=110, min_multiplier=0.05)
    assert schedule.multiplier(0) == 0.05
    assert schedule.multiplier(5) == 0.5
    assert schedule.multiplier(10) == 1.0
    assert schedule.multiplier(60) == pytest.approx(0.5)
    assert schedule.multiplier(109) == 0.05
    values = [schedule.multiplier(step) for step in range(10, 111)]
    assert values == sorted(values, reverse=True)


def test_it_stays_at_the_floor_past_the_end():
    schedule = Schedule(0, 50, 0.1)
    assert [schedule.multiplier(step) for step in (50, 60, 100, 10_000)] == [0.1] * 4


def test_without_warm_up_it_begins_at_the_top():
    assert Schedule(0, 50, 0.1).multiplier(0) == 1.0
