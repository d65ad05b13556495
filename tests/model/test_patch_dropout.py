"""Patch dropout computes what attention to the kept patches alone computes, in training only."""

import pytest
import torch
from small_models import small_batch, small_config, small_model

from model.building import build_model
from model.config import TemporalConfig, VisionConfig
from model.flops import image_flops
from runtime.errors import UserError

SIZES = {"patch_size": 8, "width": 48, "depth": 2, "heads": 3, "drop_path": 0.0}


def encoder(kind, share):
    torch.manual_seed(0)
    model = small_model(vision_encoder=VisionConfig(type=kind, patch_dropout=share, **SIZES))
    for name, parameter in model.named_parameters():
        if "relative_position" in name:
            torch.nn.init.normal_(parameter)
    return model.vision_encoder


def kept_alone(whole, images, kept):
    """Tokens (N, K, D) of the encoder without dropout, whose attention cannot see other tokens than the kept ones."""
    hidden = torch.ones(17, dtype=torch.bool)
    hidden[kept] = False
    mask = torch.zeros(1, 1, 17, 17).masked_fill(hidden, -torch.inf)
    whole._choose_attention(images)
    if whole._biased:
        for attention in whole._biased:
            attention.bias = attention._get_rel_pos_bias() + mask
        raw = whole.transformer.forward_features(images)
    else:
        raw = whole.transformer.forward_features(images, attn_mask=mask[0, 0])
    return whole.layernorm(raw)[:, kept]


@pytest.mark.parametrize("kind", ["beit", "vit"])
@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_tokens_are_those_of_the_kept_patches_alone(kind, layer_by_layer):
    images = small_batch()[0][:, 0]
    whole, dropping = encoder(kind, 0.0), encoder(kind, 0.5).train()
    dropping.weights_in_layers = layer_by_layer
    torch.manual_seed(7)
    tokens, pooled = dropping(images)
    torch.manual_seed(7)
    kept = [0, *(1 + torch.randperm(16)[:8]).sort().values.tolist()]
    torch.testing.assert_close(tokens, kept_alone(whole, images, kept))
    assert pooled.shape == (4, 48)
    torch.manual_seed(8)
    assert not torch.equal(dropping(images)[0], tokens)


def test_evaluation_sees_all_patches_and_state_dicts_do_not_differ():
    images = small_batch()[0][:, 0]
    whole, dropping = encoder("beit", 0.0).eval(), encoder("beit", 0.5).train()
    dropping(images)
    for one, other in zip(whole(images), dropping.eval()(images)):
        assert torch.equal(one, other)
    assert whole.state_dict().keys() == dropping.state_dict().keys()


def test_a_step_with_frames_and_the_temporal_encoder_trains_all_parameters_of_the_vision_encoder():
    vision = VisionConfig(type="beit", patch_dropout=0.5, **SIZES)
    model = small_model(vision_encoder=vision, num_frames=3, temporal_vision_encoder=TemporalConfig(enable=True))
    sum(model(*small_batch(frames=3)).values()).backward()
    assert all(p.grad is not None for p in model.vision_encoder.parameters())
    assert image_flops(model)[1] == 1 + 8


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"patch_dropout": 1.0}, "patch_dropout is 1.0: must be at least 0 and below 1"),
        ({"type": "eva02_tiny_patch14_224", "patch_size": 8, "width": 192, "depth": 12}, "does not support"),
    ],
)
def test_wrong_shares_and_other_transformers_are_errors(changes, what):
    with pytest.raises(UserError, match=what):
        build_model(small_config(vision_encoder=VisionConfig(**{**SIZES, "patch_dropout": 0.5, **changes})))
