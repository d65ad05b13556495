"""`python -m train.filters`: filters made of the photos of packed corpora."""

import re

import pytest
import torch
from safetensors.torch import load_file

from model.checkpoints.pretrained import new_model
from model.config import ModelConfig
from train.config.settings import load_settings
from train.filters import main

IDS = {"pad_id": 0, "cls_id": 1, "mask_id": 2}


@pytest.fixture
def settings(shapes, tmp_path):
    def made(*others, type="patch_filters", pretrained=tmp_path / "filters"):
        given = "" if pretrained is None else f", pretrained: {pretrained}"
        options = ", options: {filters: 12, grid: 2}" if type == "patch_filters" else ""
        vision = f"vision_encoder={{type: {type}, width: 32, depth: 1, heads: 2{options}{given}}}"
        sizes = ("image_res=32", "batch_size={image: 8, video: 8}", vision)
        return ["configs/demo/pretrain.yaml", f"data_root={shapes.shards}", *sizes, *others]

    return made


def test_filters_depend_on_the_photos_alone_and_a_model_starts_from_them(settings, tmp_path, capsys):
    assert main(settings()) == 0
    path = tmp_path / "filters/model.safetensors"
    assert re.fullmatch(rf"{path}: filters made of patches of \d+ images\n", capsys.readouterr().out)
    first = path.read_bytes()
    assert main(settings("threads=1", "batch_size.image=8")) == 0
    assert path.read_bytes() == first
    run = load_settings(settings()[0], settings()[1:]).config
    model = new_model(ModelConfig.of(run, num_frames=1), IDS)
    for name, tensor in load_file(path).items():
        assert torch.equal(model.vision_encoder.filters.get_parameter(name), tensor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "beit"}, "vision_encoder.type is beit: only patch_filters has filters to make"),
        ({"pretrained": None}, "vision_encoder.pretrained is not set: name a folder for the filters"),
    ],
)
def test_what_cannot_be_made_is_one_line(settings, capsys, changes, message):
    assert main(settings(**changes)) == 2
    assert capsys.readouterr().err.strip().endswith(message)


def test_packed_corpora_are_not_written_into(settings, shapes, capsys):
    assert main(settings(pretrained=shapes.shards / "images_train")) == 2
    assert "the packed corpus" in capsys.readouterr().err
