"""Which parameters decay, and which have a learning rate of their own."""

import pytest

from train.config.settings import DifferentLearningRate, OptimizerConfig
from train.groups import parameter_groups

DIMENSIONS = {"temp": 0, "norm.weight": 1, "norm.bias": 1, "proj.weight": 2, "proj.bias": 1, "odd.bias": 2, "head.w": 2}


def test_biases_and_vectors_do_not_decay():
    decaying, others = parameter_groups(DIMENSIONS, OptimizerConfig(lr=1e-3, weight_decay=0.1))
    assert (decaying.lr, decaying.weight_decay) == (1e-3, 0.1)
    assert set(decaying.names) == {"temp", "proj.weight", "head.w"}
    assert others.weight_decay == 0
    assert set(others.names) == {"norm.weight", "norm.bias", "proj.bias", "odd.bias"}


def test_named_modules_have_their_own_rate():
    config = OptimizerConfig(different_lr=DifferentLearningRate(True, ["proj"], 0.5))
    rates = {name: group.lr for group in parameter_groups(DIMENSIONS, config) for name in group.names}
    assert {name for name, lr in rates.items() if lr == 0.5} == {"proj.weight", "proj.bias"}
    assert set(rates) == set(DIMENSIONS)


def test_an_unknown_module_is_named_with_the_nearest():
    config = OptimizerConfig(different_lr=DifferentLearningRate(True, ["prj"], 0.5))
    with pytest.raises(ValueError, match=r"'prj'.*nearest are proj"):
        parameter_groups(DIMENSIONS, config)
