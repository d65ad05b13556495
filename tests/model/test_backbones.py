"""Other vision transformers of timm, by name, with any patch size and resolution."""

import pytest
import torch
from small_models import CLS, MASK, PAD, small_batch, small_config

from model.checkpoints.loading import load_model, save_model
from model.checkpoints.pretrained import new_model
from model.config import TemporalConfig
from model.singularity import Singularity
from model.torchvision_cpu import create_model

# Name, its width and depth: with [CLS]; with none; with rotary positions and a key bias; with registers.
NAMED = {
    "vit_tiny_patch16_224": (192, 12, 1),
    "vit_base_patch16_siglip_224": (768, 12, 0),
    "eva02_tiny_patch14_224": (192, 12, 1),
    "vit_small_patch14_reg4_dinov2": (384, 12, 5),
}


def named(name, patch_size=8, image_res=32, **changes):
    config = small_config(image_res=image_res, **changes)
    vision = config.vision_encoder
    vision.type, vision.patch_size = name, patch_size
    vision.width, vision.depth = NAMED.get(name, (192, 12, 1))[:2]
    return config


@pytest.mark.parametrize("name", NAMED)
def test_a_timm_backbone_trains_and_loads_again(name, tmp_path):
    torch.manual_seed(0)
    temporal = TemporalConfig(True, 1, update_pooler_embed=True)
    config = named(name, num_frames=2, temporal_vision_encoder=temporal, add_temporal_embed=True)
    model = Singularity(config, PAD, CLS, MASK)
    images, *texts = small_batch(frames=2)
    torch.stack(list(model(images, *texts).values())).sum().backward()
    assert (
        model.vision_encoder.transformer.blocks[0].mlp.fc2.weight.grad.any() if name != "eva02_tiny_patch14_224" else 1
    )
    prefix = max(1, NAMED[name][2])
    with torch.no_grad():
        tokens, pooled = model.eval().encode_frames(images)
        assert tokens.shape == (4, 2, prefix + 16, config.vision_encoder.width)
        assert pooled.shape == (4, 2, config.vision_encoder.width)
        save_model(model, config, tmp_path)
        again, _ = load_model(tmp_path).encode_frames(images)
        assert torch.equal(again, tokens)
        assert load_model(tmp_path, {"image_res": 48}).encode_frames(small_batch(frames=2, size=48)[0])[0].shape[2] == (
            prefix + 36
        )


def test_weights_of_a_folder_are_fitted_to_patch_size_and_resolution(tmp_path):
    donor = create_model("vit_tiny_patch16_224", num_classes=0)
    torch.save(donor.state_dict(), tmp_path / "pytorch_model.bin")
    config = named("vit_tiny_patch16_224", patch_size=16, image_res=64)
    config.vision_encoder.pretrained = str(tmp_path)
    ours = new_model(config).vision_encoder.transformer
    assert torch.equal(ours.blocks[3].mlp.fc1.weight, donor.blocks[3].mlp.fc1.weight)
    assert ours.pos_embed.shape == (1, 17, 192)
    config.vision_encoder.patch_size = 8
    assert new_model(config).vision_encoder.transformer.patch_embed.proj.weight.shape == (192, 3, 8, 8)


def test_pixel_statistics_are_those_of_the_backbone():
    model = Singularity(named("eva02_tiny_patch14_224"), PAD, CLS, MASK)
    assert model.mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)


def test_an_unsuitable_backbone_is_an_error():
    for name, message in {
        "resnet18": "set vision_encoder.width=512",
        "vit_huge_potato": "'vit_huge_potato', must be one of .*the name of another image backbone of timm",
        "vit_small_patch16_224": "set vision_encoder.width=384 vision_encoder.depth=12",
    }.items():
        with pytest.raises(ValueError, match=message):
            Singularity(named(name), PAD, CLS, MASK)
