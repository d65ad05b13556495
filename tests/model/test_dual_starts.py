"""Models that start from CLIP and SigLIP: at the start the embeddings of images and texts are transformers'."""

import json

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from model.checkpoints.loading import load_model, save_model
from model.checkpoints.pretrained import new_model
from model.checkpoints.published import adopt_published
from model.config import LossWeights, ModelConfig

TEXT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": 70}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
PATCHES = {"image_size": 32, "patch_size": 8}
CLIP_TEXT = {"max_position_embeddings": 12, "bos_token_id": 68, "eos_token_id": 69, "pad_token_id": 69}
PAD, BOS, EOS = 69, 68, 69


def clip_folder(folder):
    torch.manual_seed(2)
    config = CLIPConfig(text_config={**TEXT, **CLIP_TEXT}, vision_config={**VISION, **PATCHES}, projection_dim=20)
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    return model


def siglip_folder(folder):
    torch.manual_seed(2)
    text = {**TEXT, "max_position_embeddings": 12, "projection_size": 32}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**VISION, **PATCHES})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def start(folder, explicit=(), pad=PAD, mlm=0.0, **settings):
    config = ModelConfig(dual_encoder=str(folder), loss_weight=LossWeights(mlm=mlm), **settings)
    adopt_published(config, set(explicit))
    torch.manual_seed(5)
    return new_model(config, {"pad_id": pad, "cls_id": BOS, "mask_id": -1}).eval()


def embeddings(model, images, ids, mask):
    """Unit embeddings of images (N, 3, H, W) and of texts."""
    with torch.no_grad():
        pooled, states = model.encode_visual(images[:, None])[1], model.encode_text(ids, mask)[1]
        return model.project_visual(pooled)[:, 0], model.project_text(states)


def unit(output):
    return torch.nn.functional.normalize(output.pooler_output, dim=-1)


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
CLIP_IDS = torch.tensor([[BOS, 7, 9, 11, 30, EOS], [BOS, 8, EOS, PAD, PAD, PAD]])
CLIP_MASK = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])


def test_a_model_that_starts_from_clip_embeds_as_clip_does(tmp_path):
    clip = clip_folder(tmp_path)
    model = start(tmp_path)
    assert model.config.image_res == 32
    assert model.config.embed_dim == 20
    assert (model.config.text_encoder.layers, model.config.text_encoder.fusion_layer) == (5, 2)
    with torch.no_grad():
        theirs = unit(clip.get_image_features(IMAGES)), unit(clip.get_text_features(CLIP_IDS, CLIP_MASK))
    for ours, expected in zip(embeddings(model, IMAGES, CLIP_IDS, CLIP_MASK), theirs, strict=True):
        assert torch.allclose(ours, expected, atol=1e-5)
    assert model.temp.item() == pytest.approx(torch.exp(-clip.logit_scale).item())
    assert model.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_padding_does_not_change_clips_states(tmp_path):
    clip_folder(tmp_path)
    model = start(tmp_path)
    with torch.no_grad():
        long, short = (model.text_encoder(CLIP_IDS[1:, :n], CLIP_MASK[1:, :n]) for n in (6, 3))
    assert torch.allclose(long[:, :3], short, atol=1e-6)


def test_a_model_that_starts_from_siglip_embeds_as_siglip_does(tmp_path):
    siglip = siglip_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5] * 3})
    )
    model = start(tmp_path, pad=0)
    assert model.mean == (0.1, 0.2, 0.3)
    ids = torch.tensor([[2, 7, 9, 11, 30, 1], [2, 8, 1, 0, 0, 0]])  # the first token is ours, 1 ends, 0 pads
    whole = torch.nn.functional.pad(ids[:, 1:], (0, 7))
    with torch.no_grad():
        theirs = unit(siglip.get_image_features(IMAGES)), unit(siglip.get_text_features(whole))
        states = siglip.text_model(whole).last_hidden_state
    for ours, expected in zip(embeddings(model, IMAGES, ids, (ids > 0).long()), theirs, strict=True):
        assert torch.allclose(ours, expected, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(model.text_encoder(ids, (ids > 0).long())[:, 1:], states[:, :5], atol=1e-5)
    assert model.temp.item() == pytest.approx(torch.exp(-siglip.logit_scale).item())
    assert model.text_encoder.flops(3) == model.text_encoder.flops(12) > 0


@pytest.mark.parametrize("folder", [clip_folder, siglip_folder])
def test_another_image_size_resizes_the_positions(tmp_path, folder):
    dual = folder(tmp_path)
    model = start(tmp_path, explicit={"image_res"}, image_res=48)
    images = torch.nn.functional.interpolate(IMAGES, size=48)
    with torch.no_grad():
        ours = model.project_visual(model.encode_visual(images[:, None])[1])[:, 0]
        theirs = unit(dual.get_image_features(images, interpolate_pos_encoding=True))
    assert (ours * theirs).sum(-1).min() > 0.99


def test_a_vision_tower_alone_sees_for_a_bert(tmp_path):
    clip = clip_folder(tmp_path)
    config = ModelConfig()
    config.vision_encoder.pretrained, text = str(tmp_path), config.text_encoder
    text.layers, text.fusion_layer, text.width, text.heads, text.intermediate, text.vocab_size = 2, 1, 24, 2, 48, 60
    adopt_published(config, set())
    with torch.no_grad():
        tokens, pooled = new_model(config).eval().vision_encoder(IMAGES)
        expected = clip.vision_model(IMAGES)
    assert torch.allclose(pooled, expected.pooler_output, atol=1e-5)
    assert tokens.shape == (2, 17, 32)


def test_the_weights_of_a_dual_start_need_nothing_beside_them(tmp_path):
    clip_folder(tmp_path / "clip")
    model = start(tmp_path / "clip")
    model.freeze(["vision_encoder.model", "text_encoder.model"])
    assert not any(each.requires_grad for each in model.vision_encoder.parameters())
    save_model(model, model.config, tmp_path / "saved")
    (tmp_path / "clip" / "config.json").unlink()
    again = load_model(tmp_path / "saved")
    assert again.mean == model.mean
    for first, second in zip(
        embeddings(model, IMAGES, CLIP_IDS, CLIP_MASK), embeddings(again, IMAGES, CLIP_IDS, CLIP_MASK), strict=True
    ):
        assert torch.equal(first, second)
    larger = load_model(tmp_path / "saved", {"image_res": 48})
    assert larger.vision_encoder(torch.zeros(1, 3, 48, 48))[0].shape == (1, 37, 32)


def test_what_does_not_fit_a_dual_encoder_is_refused(tmp_path):
    clip_folder(tmp_path)
    with pytest.raises(ValueError, match=r"loss_weight\.mlm is 1, but the text encoders of CLIP and SigLIP .*mlm=0"):
        start(tmp_path, mlm=1.0)
    with pytest.raises(ValueError, match=r"embed_dim is 256 here and 20 in .*dual_encoder names"):
        start(tmp_path, explicit={"embed_dim"})
    (tmp_path / "config.json").write_text('{"model_type": "siglip2"}')
    with pytest.raises(ValueError, match=r"holds a siglip2 model: must be one of clip, siglip"):
        start(tmp_path)
