"""The learning rate at each step: warm-up, cosine, floor, and the end."""

import json
from pathlib import Path

import pytest

from train.schedule import Schedule

GOLDEN = Path(__file__).resolve().parents[3] / "shared/golden/08_pure/tables/lr_schedule.json"


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


@pytest.mark.shared
@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else [])
def test_official_numbers(case):
    schedule = Schedule(case["num_warmup_steps"], case["num_training_steps"], case["min_lr_multi"])
    for step, official in enumerate(case["lr_at_step"][: case["num_training_steps"]]):
        ours = [lr * schedule.multiplier(step) for lr in case["base_lrs"]]
        assert ours == pytest.approx(official, rel=1e-9), step
