"""Every ZeRO stage, with and without CPU offload, learns the same, also from steps that leave some parameters out."""

from dataclasses import replace

import pytest
import torch
from small_engine import SMALL, make, numbers, step

from model.config import TemporalConfig

pytestmark = pytest.mark.usefixtures("one_process")

TEMPORAL = replace(
    SMALL,
    num_frames=2,
    add_temporal_embed=True,
    temporal_vision_encoder=TemporalConfig(enable=True, num_layers=1),
)


def after_steps(zero, **settings):
    """Weights and moments after clips and images in turn; the images leave the temporal encoder out."""
    engine, guard = make(zero, "fp32", TEMPORAL, **settings)
    for number, num_frames in enumerate((2, 1, 2, 1), 1):
        torch.manual_seed(number)
        step(engine, guard, number, num_frames=num_frames)
    return engine, numbers(engine)


@pytest.fixture(scope="module")
def plain(one_process):
    """What is learned under ZeRO 0."""
    return after_steps("zero0")[1]


def assert_same(found, plain):
    for (name, kind), tensor in plain.items():
        if kind == "exp_avg":  # weights would show no scale
            difference = (found[name, kind].flatten() - tensor.flatten()).norm()
            assert difference <= 0.02 * tensor.norm() + 1e-6, name


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_what_a_step_does_not_use_learns_nothing_from_the_step_before(zero, plain):
    assert_same(after_steps(zero)[1], plain)
