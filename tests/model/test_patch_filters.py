"""Filters made of patches of photos: what they compute, and the encoder above them."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from small_models import CLS, MASK, PAD, small_config
from torch.nn import functional

from model.checkpoints.pretrained import new_model
from model.config import VisionConfig
from model.patch_filters import CONTRAST, PatchFilters, contrast_normalized
from model.vision import build_vision
from runtime.errors import UserError

IDS = {"pad_id": PAD, "cls_id": CLS, "mask_id": MASK}


def config(**options):
    vision = VisionConfig(type="patch_filters", width=48, options={"filters": 20, "grid": 3, **options})
    return small_config(vision_encoder=vision, image_res=32)


def smooth_images(count, size=32):
    """Images whose neighbouring pixels are alike, as those of photos are."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return functional.interpolate(coarse, size=size, mode="bilinear")


@pytest.fixture
def learned():
    filters = PatchFilters(20, 6, 2, 3)
    assert filters.learn(smooth_images(200).split(64)) == 200
    return filters


def test_the_responses_are_those_of_each_patch_by_itself(learned):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    patches = functional.unfold(images, 6, stride=2).mT  # (2, 14 * 14, 108)
    normalized = contrast_normalized(patches.flatten(0, 1))
    above = (normalized @ learned.filters.flatten(1).T - learned.threshold).relu().view(2, 14, 14, 20)
    wanted = [above.mean((1, 2))]
    for rows in ((0, 5), (4, 10), (9, 14)):  # cells of 14 / 3 patches, as those of adaptive pooling
        wanted += [above[:, slice(*rows), slice(*columns)].mean((1, 2)) for columns in ((0, 5), (4, 10), (9, 14))]
    wanted = (torch.stack(wanted, 1).sqrt() - learned.mean) * learned.scale
    torch.testing.assert_close(learned(images), wanted, rtol=1e-3, atol=2e-3)


def test_features_of_the_images_learned_from_are_standardised(learned):
    features = learned(smooth_images(200))
    torch.testing.assert_close(features.mean(0), torch.zeros(10, 20), rtol=0, atol=1e-3)
    spread = features.std(0)
    assert spread.min() > 0.7  # less than 1, so that filters that hardly ever respond are not blown up
    assert spread.max() < 1.01


def test_it_does_not_see_brightness_and_keeps_flat_patches_flat(learned):
    images = smooth_images(4) / 4
    torch.testing.assert_close(learned(images + 0.5), learned(images), rtol=1e-3, atol=2e-3)
    flat = contrast_normalized(torch.full((1, 108), 0.7) + 1e-3 * torch.randn(1, 108))
    assert flat.abs().max() < 5e-3 / CONTRAST**0.5


def test_the_pooled_vector_is_the_sum_of_the_cells_and_frozen_filters_cost_no_gradient():
    encoder = build_vision(config(dropout=0.0))
    encoder.filters.requires_grad_(False)
    tokens, pooled = encoder(smooth_images(2))
    assert tokens.shape == (2, 10, 48)
    torch.testing.assert_close(tokens[:, 0], pooled)
    whole = torch.einsum("nf,fd->nd", encoder.filters(smooth_images(2))[:, 0], encoder.maps[0])
    torch.testing.assert_close(whole + tokens[:, 1:].sum(1), pooled, rtol=1e-4, atol=1e-5)
    pooled.sum().backward()
    assert encoder.maps.grad.abs().sum() > 0
    assert encoder.filters.filters.grad is None


def test_gradient_checkpointing_changes_nothing():
    encoder = build_vision(config(dropout=0.0))
    grads = []
    for recompute in (False, True):
        encoder.set_gradient_checkpointing(recompute)
        encoder.zero_grad()
        encoder(smooth_images(2))[1].square().sum().backward()
        grads.append(encoder.filters.filters.grad.clone())
    torch.testing.assert_close(*grads)


def test_a_model_starts_from_filters_in_a_folder(learned, tmp_path):
    save_file(learned.state_dict(), tmp_path / "model.safetensors")
    start = config()
    start.vision_encoder.pretrained = str(tmp_path)
    model = new_model(start, IDS)
    for name, tensor in learned.state_dict().items():
        assert torch.equal(model.vision_encoder.filters.state_dict()[name], tensor)
    assert 0 < model.vision_encoder.maps.std() < 1
    save_file({"filters": learned.filters.detach()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"does not fit the sizes under vision_encoder .*filters\.threshold"):
        new_model(start, IDS)


@pytest.mark.parametrize("folder", [None, "nowhere", ""])
def test_filters_that_were_not_made_are_one_line_with_the_command(tmp_path, folder):
    start = config()
    start.vision_encoder.pretrained = None if folder is None else str(tmp_path / folder)
    with pytest.raises(
        UserError, match=r"finds no model\.safetensors: `python -m train\.filters CONFIG\.yaml` makes it"
    ):
        new_model(start, IDS)


@pytest.mark.parametrize("options", [{"grid": 15}, {"size": 40}, {"filters": 0}])
def test_sizes_that_do_not_fit_are_refused(options):
    with pytest.raises(UserError, match="does not fit image_res=32"):
        build_vision(config(**options))


def test_it_takes_images_of_another_size(learned):
    assert learned(smooth_images(2, 48)).shape == (2, 10, 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_and_its_gradients_are_finite(learned, dtype):
    images = smooth_images(16)
    images[0] = 0.8  # a flat image, to which no filter responds
    wanted = learned(images).detach()
    half = copy.deepcopy(learned).to(dtype)
    found = half(images.to(dtype))
    assert found.dtype == dtype
    assert (found.float() - wanted).abs().mean() < 0.05
    found.square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in half.parameters())
