"""Initial weights from checkpoint folders, and errors for unusable ones."""

import json

import pytest
import torch
from small_models import small_config

from model.checkpoints.files import Weights
from model.checkpoints.pretrained import new_model
from model.export import official_state


def write_folders(tmp_path, config):
    """Folders in Hugging Face's form, as a published BEiT and BERT have them, filled from a random model."""
    torch.manual_seed(3)
    donor = new_model(config)
    state = official_state(Weights(config, donor.state_dict()))
    folders = {
        "vision": {
            "beit." + k.removeprefix("vision_encoder."): v for k, v in state.items() if k.startswith("vision_e")
        },
        "text": {
            k.removeprefix("text_encoder.").replace("LayerNorm.weight", "LayerNorm.gamma"): v
            for k, v in state.items()
            if k.startswith("text_encoder.") and "crossattention" not in k
        },
    }
    for name, tensors in folders.items():
        (tmp_path / name).mkdir()
        torch.save(tensors, tmp_path / name / "pytorch_model.bin")
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "bert" if name == "text" else "beit"}))
    return donor


def test_encoders_start_from_pretrained_folders(tmp_path):
    config = small_config()
    donor = write_folders(tmp_path, config)
    config.vision_encoder.pretrained, config.text_encoder.pretrained = str(tmp_path / "vision"), str(tmp_path / "text")
    torch.manual_seed(4)
    model = new_model(config)
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, donor.state_dict()[name])}
    taken = ("vision_encoder.transformer.", "word_head.", "text_encoder.")
    for name, tensor in model.state_dict().items():
        if name.startswith(taken) and "crossattention" not in name:
            assert name in same
        elif tensor.ndim == 2 and name != "temp":
            assert name not in same


def test_another_image_size_interpolates_the_positions_and_other_weights_are_refused(tmp_path):
    write_folders(tmp_path, small_config())
    config = small_config(image_res=48)
    config.vision_encoder.pretrained = str(tmp_path / "vision")
    table = new_model(config).vision_encoder.transformer.blocks[0].attn.relative_position_bias_table
    assert table.shape == (11 * 11 + 3, 3)
    for part, pretrained, changes, message in (
        ("vision", tmp_path / "vision", {"depth": 3}, r"does not fit the sizes under vision_encoder .*blocks\.2"),
        ("text", tmp_path / "vision", {}, "holds a beit model"),
        ("vision", tmp_path, {}, r"vision_encoder\.pretrained: .* has none of model\.safetensors"),
        ("vision", "/no/beit", {}, r"the folder /no/beit does not exist; set vision_encoder\.pretrained"),
    ):
        config = small_config()
        for name, value in {"pretrained": str(pretrained), **changes}.items():
            setattr(getattr(config, f"{part}_encoder"), name, value)
        with pytest.raises(ValueError, match=message):
            new_model(config)


@pytest.mark.parametrize("name", ["bert-base-uncased", "beit_base_patch16_224"])
def test_a_hub_name_without_network_is_an_error_with_the_remedy(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config, part = small_config(), "vision_encoder" if "beit" in name else "text_encoder"
    getattr(config, part).pretrained = name
    with pytest.raises(ValueError, match=f"{part}.pretrained: .* could not be fetched .* set {part}.pretrained to"):
        new_model(config)


def config_of_width(width):
    """A model of this width, its `initializer_range` as the recipes for small models choose it."""
    config = small_config()
    for part in (config.text_encoder, config.vision_encoder):
        part.width, part.heads, part.initializer_range = width, 4, width**-0.5
    config.text_encoder.intermediate = 4 * width
    return config


def spread(states):
    """How much rows (N, D) differ, as a share of their length."""
    return float((states - states.mean(0)).norm() / states.norm())


def difference_between_texts(config):
    """By how much the first tokens of different texts differ before any training."""
    torch.manual_seed(5)
    model = new_model(config).eval()
    ids = torch.randint(5, config.text_encoder.vocab_size, (32, 10))
    ids[:, 0] = 2
    with torch.no_grad():
        return spread(model.encode_text(ids, torch.ones_like(ids))[1])


def difference_between_visuals(config):
    """The same of one text's first token that looks at different visuals."""
    torch.manual_seed(6)
    model = new_model(config).eval()
    ids = torch.randint(5, config.text_encoder.vocab_size, (1, 10)).expand(32, -1)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        attended = model.text_encoder.attend_texts(model.encode_text(ids, mask)[0], mask)
        keys = model.visual_keys(torch.randn(32, 5, config.vision_encoder.width))
        return spread(model.text_encoder.fuse_pairs(attended, mask, keys)[0])


@pytest.mark.parametrize("difference", [difference_between_texts, difference_between_visuals])
def test_initial_states_of_a_narrow_model_differ_as_much_as_those_of_a_wide_one(difference):
    assert 0.5 < difference(config_of_width(64)) / difference(config_of_width(768)) < 2


@pytest.mark.parametrize("kind", ["beit", "vit"])
def test_initializer_range_is_the_initial_standard_deviation(kind):
    config = small_config()
    config.vision_encoder.type = kind
    config.vision_encoder.initializer_range, config.text_encoder.initializer_range = 0.06, 0.1
    config.temporal_vision_encoder.enable = True
    model = new_model(config)
    assert model.vision_encoder.transformer.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.06, rel=0.1)
    temporal, fusion = model.temporal_vision_encoder.layer[0], model.text_encoder.layer[-1]
    for module in (fusion.crossattention.self.query, model.word_head.transform.dense, temporal.intermediate.dense):
        assert module.weight.std().item() == pytest.approx(0.1, rel=0.1)
