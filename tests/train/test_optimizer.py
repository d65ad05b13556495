"""Learning rates and weight decay: warm-up, cosine and floor; groups of parameters with their own."""

import pytest

from train.config.settings import DifferentLearningRate, OptimizerConfig
from train.optimizer import Schedule, parameter_groups

DIMENSIONS = {"temp": 0, "norm.weight": 1, "norm.bias": 1, "proj.weight": 2, "proj.bias": 1, "odd.bias": 2, "head.w": 2}


def test_the_learning_rate_warms_up_from_the_floor_and_decays_to_it():
    schedule = Schedule(warmup_steps=10, total_steps=110, min_multiplier=0.05)
    assert [schedule.multiplier(step) for step in (0, 5, 10, 109, 110, 10_000)] == [0.05, 0.5, 1.0, 0.05, 0.05, 0.05]
    assert schedule.multiplier(60) == pytest.approx(0.5)
    values = [schedule.multiplier(step) for step in range(10, 111)]
    assert values == sorted(values, reverse=True)
    assert Schedule(0, 50, 0.1).multiplier(0) == 1.0


def test_biases_and_vectors_do_not_decay():
    decaying, others = parameter_groups(DIMENSIONS, OptimizerConfig(lr=1e-3, weight_decay=0.1))
    assert (decaying.lr, decaying.weight_decay, others.weight_decay) == (1e-3, 0.1, 0)
    assert set(decaying.names) == {"temp", "proj.weight", "head.w"}
    assert set(others.names) == {"norm.weight", "norm.bias", "proj.bias", "odd.bias"}


def test_named_modules_have_their_own_rate_and_an_unknown_one_is_reported():
    config = OptimizerConfig(different_lr=DifferentLearningRate(True, ["proj"], 0.5))
    rates = {name: group.lr for group in parameter_groups(DIMENSIONS, config) for name in group.names}
    assert {name for name, lr in rates.items() if lr == 0.5} == {"proj.weight", "proj.bias"}
    assert set(rates) == set(DIMENSIONS)
    config = OptimizerConfig(different_lr=DifferentLearningRate(True, ["prj"], 0.5))
    with pytest.raises(ValueError, match=r"'prj'.*nearest is proj"):
        parameter_groups(DIMENSIONS, config)
