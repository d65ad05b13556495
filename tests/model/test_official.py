"""Official checkpoints: written and read back bit for bit, recognised, and hostile or broken files refused."""

import os
import pickle
import zipfile

import pytest
import torch
from small_models import CLS, MASK, PAD, small_config

from model.building import build_model
from model.checkpoints.files import Weights
from model.checkpoints.loading import load_model, load_weights
from model.checkpoints.official import read_official, read_official_file
from model.config import AnswerDecoderConfig, LossWeights, TemporalConfig
from model.export import official_state, write_official

VARIANTS = {
    "pretrained": {},
    "retrieval": {"loss_weight": LossWeights(mlm=0.0)},
    "temporal": {"temporal_vision_encoder": TemporalConfig(True, 2, True), "num_frames": 4, "add_temporal_embed": True},
    "answers": {"answer_decoder": AnswerDecoderConfig(True, 2), "loss_weight": LossWeights(mlm=0.0)},
}


def head_width_64(kind="beit", **changes):
    """Official files do not say how many heads there are: 64 wide ones, as in every published model."""
    config = small_config(**changes)
    config.vision_encoder.type, config.vision_encoder.width, config.vision_encoder.heads = kind, 128, 2
    config.vision_encoder.drop_path = 0.1 if kind == "beit" else 0.0
    config.text_encoder.width, config.text_encoder.heads, config.text_encoder.dropout = 128, 2, 0.1
    return config


@pytest.fixture(params=[(kind, name) for kind in ("beit", "vit") for name in VARIANTS], ids="-".join)
def variant(request):
    kind, name = request.param
    config = head_width_64(kind, **VARIANTS[name])
    torch.manual_seed(0)
    return build_model(config, {"pad_id": PAD, "cls_id": CLS, "mask_id": MASK}), config


def test_the_round_trip_is_bit_identical_and_the_variant_recognised(variant, tmp_path):
    model, config = variant
    write_official(Weights(config, model.state_dict()), tmp_path / "x.pth")
    back = read_official(tmp_path / "x.pth")
    assert back.config == config
    assert back.state.keys() == model.state_dict().keys()
    assert all(torch.equal(back.state[name], tensor) for name, tensor in model.state_dict().items())
    first = read_official_file(tmp_path / "x.pth")["model"]
    again = official_state(back)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    forget(tmp_path / "x.pth")
    assert read_official(tmp_path / "x.pth").config == config  # by its tensors alone


def forget(path, **settings):
    """Make of an exported file one as the official code writes it, with these further settings."""
    content = torch.load(path, weights_only=False)
    del content["config"]["model_config"]
    content["config"].update(settings)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("kind", "width", "heads", "changes"),
    [
        ("beit", 32, 2, {}),
        ("vit", 32, 8, {}),
        ("vit", 44, 2, {"mlp_ratio": 49.5 / 44}),
        ("beit", 128, 2, {"layer_scale": 0.0}),
    ],
)
def test_models_of_unusual_sizes_come_back(kind, width, heads, changes, tmp_path):
    config = head_width_64(kind)
    for name, value in {"width": width, "heads": heads, **changes}.items():
        setattr(config.vision_encoder, name, value)
    write_official(Weights(config, build_model(config).state_dict()), tmp_path / "x.pth")
    assert read_official(tmp_path / "x.pth").config == config
    forget(tmp_path / "x.pth", num_attention_heads={"vision": heads, "text": 2})  # as earlier versions wrote it
    found = read_official(tmp_path / "x.pth").config.vision_encoder
    assert (found.width, found.heads, found.layer_scale) == (width, heads, config.vision_encoder.layer_scale)
    assert int(found.width * found.mlp_ratio) == int(width * config.vision_encoder.mlp_ratio)
    load_model(tmp_path / "x.pth")


def test_a_narrow_file_that_does_not_tell_its_heads_is_refused(tmp_path):
    config = head_width_64("vit")
    config.vision_encoder.width = 32
    write_official(Weights(config, build_model(config).state_dict()), tmp_path / "x.pth")
    forget(tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"its vision encoder of width 32 is unknown: put a vision_config\.json"):
        read_official(tmp_path / "x.pth")


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_file_is_refused_and_nothing_of_it_runs(tmp_path, legacy):
    content = {"model": {}, "config": Hostile(tmp_path / "ran")}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"x\.pth names \w+\.system and is refused"):
        load_weights(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


def test_broken_and_foreign_files_are_named(tmp_path):
    config, path = head_width_64(), tmp_path / "x.pth"
    write_official(Weights(config, build_model(config).state_dict()), path)
    whole = path.read_bytes()
    for data, message in (
        (whole[: len(whole) // 2], r"x\.pth cannot be read .*truncated"),
        (b"this is not a checkpoint", r"x\.pth"),
        (b"", r"x\.pth cannot be read"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            load_weights(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(ValueError, match=r"x\.pth"):
        load_weights(path)
    for content, message in (
        ({"state_dict": {}}, "no entries `model` and `config`"),
        ({"model": {"a": torch.zeros(1)}, "config": {}}, "is not a Singularity checkpoint: it has no tensor"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_weights(path)


def test_missing_tensors_of_an_official_file_are_listed(tmp_path):
    config = head_width_64()
    path = tmp_path / "x.pth"
    write_official(Weights(config, build_model(config).state_dict()), path)
    content = torch.load(path, weights_only=False)
    del content["model"]["itm_head.weight"]
    content["model"]["surprise"] = torch.zeros(2)
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"missing: itm_head\.weight; unexpected: surprise"):
        load_model(path)
