"""Joint computations of the encoders give the results of the single layers."""

import pytest
import torch
from small_models import small_batch, small_config, small_model

from model import temporal
from model.config import TemporalConfig
from model.singularity import Singularity


def gradients(model, images):
    """Tokens and gradients, in double precision: sums of other parts round otherwise."""
    model.double().zero_grad()
    tokens, pooled = model.encode_visual(images.double())
    (tokens.square().sum() + pooled.sum()).backward()
    return tokens, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_position_biases(**changes):
    torch.manual_seed(0)
    model = Singularity(small_config(**changes))
    for name, parameter in model.named_parameters():
        if "relative_position" in name:
            torch.nn.init.normal_(parameter)
    return model


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_joint_gathering_of_position_biases_equals_gathering_per_layer(monkeypatch):
    model, (images, *_) = with_position_biases(), small_batch()
    together = gradients(model, images)
    assert all(attention.bias is None for attention in model.vision_encoder._biased)
    tables = [name for name in together[1] if "relative_position" in name]
    assert len(tables) == 2
    assert all(together[1][name].any() for name in tables)
    with monkeypatch.context() as layer_by_layer:
        layer_by_layer.setattr(model.vision_encoder, "_position_biases", lambda _: ())
        assert_same(gradients(model, images), together)
    model.set_gradient_checkpointing()
    assert model.vision_encoder._position_biases() == ()
    assert_same(gradients(model, images), together)


@pytest.mark.parametrize("limit", [1, 16, 20])
def test_the_temporal_encoder_splits_batches_that_exceed_the_kernel_limit(monkeypatch, limit):
    model = small_model(num_frames=3, temporal_vision_encoder=TemporalConfig(enable=True))
    images, *_ = small_batch(frames=3)  # 4 clips of 17 positions
    expected = gradients(model, images)
    monkeypatch.setattr(temporal, "MAX_SEQUENCES", limit)
    assert_same(gradients(model, images), expected)
