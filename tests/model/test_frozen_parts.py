"""Frozen parts get no gradient and compute as in evaluation; their names are prefixes of parameter names."""

from dataclasses import replace

import pytest
import torch
from small_models import small_batch, small_config, small_model

from model.singularity import Singularity
from runtime.errors import UserError


def dropping_model() -> Singularity:
    config = small_config()
    vision, text = replace(config.vision_encoder, drop_path=0.9), replace(config.text_encoder, dropout=0.5)
    return small_model(vision_encoder=vision, text_encoder=text)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_frozen_part_gets_no_gradient_and_computes_as_in_evaluation(recompute):
    model = dropping_model()
    model.set_gradient_checkpointing(recompute)
    frames, ids, mask, idx = small_batch()
    expected = model.eval().encode_visual(frames)[0]
    assert not torch.equal(model.train().encode_visual(frames)[0], expected)
    model.freeze(["vision_encoder", "text_encoder.layer.0"])
    for _ in range(2):
        assert torch.equal(model.encode_visual(frames)[0], expected)
        assert not torch.equal(model.encode_text(ids, mask)[0], model.encode_text(ids, mask)[0])  # dropout elsewhere
        model.eval()
        model.train()
    sum(model(frames, ids, mask, idx).values()).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    below = ("vision_encoder.", "text_encoder.layer.0.")
    assert without - {"temporal_embeddings"} == {name for name in model.state_dict() if name.startswith(below)}


def test_a_part_of_which_some_is_trained_stays_in_training_mode():
    model = small_model()
    model.freeze(["text_encoder.embeddings", "text_encoder.layer.1", "temp"])
    frozen = {name for name, module in model.named_children() if not module.training}
    assert frozen == set()
    assert not model.text_encoder.embeddings.training
    assert not model.text_encoder.layer[1].attention.training
    assert model.text_encoder.layer[0].training
    assert not model.temp.requires_grad


def test_a_prefix_that_matches_nothing_names_the_nearest():
    with pytest.raises(UserError, match=r"freeze names 'visual_encoder', .*: nearest are vision_encoder"):
        small_model().freeze(["visual_encoder"])
    with pytest.raises(UserError, match=r"freeze names 'text_encoder\.layer\.1\.att', which matches no parameter"):
        small_model().freeze(["text_encoder.layer.1.att"])
