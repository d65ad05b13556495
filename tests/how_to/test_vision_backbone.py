"""docs/how-to/vision-backbone.md, word for word: its module and YAML in a folder of one's own."""

import json

import pytest
import torch
from backbones import check_engine, launch, one_process, overrides, page_model, write_files  # noqa: F401
from small_run import learned
from torch import nn

from launch.evaluate import main as evaluate
from launch.finetune_retrieval import main as finetune_retrieval
from launch.pretrain import main as pretrain
from model.building import build_model
from model.checkpoints.files import resolve_weights
from model.checkpoints.loading import load_model
from model.config import VisionConfig
from model.export import main as export
from model.flops import image_flops
from model.vision import VISION, VisionEncoder
from runtime.errors import UserError
from train.prepare import check_statistics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The user's folder; one for all tests, because a process imports a module once."""
    folder = tmp_path_factory.mktemp("own")
    write_files("vision-backbone", folder)
    return folder


@pytest.fixture(autouse=True)
def there(folder, monkeypatch, one_process):  # noqa: F811
    monkeypatch.chdir(folder)


def test_the_commands_of_the_page(shapes, folder, caplog):
    caplog.set_level("INFO")
    few = overrides(shapes)
    launch(pretrain, "my_run.yaml", *few, "output_dir=runs/cnn", "log_every=1")
    own = "pretrained_path=runs/cnn", "output_dir=runs/cnn_temporal"
    launch(finetune_retrieval, "configs/demo/finetune.yaml", *few, *own, "image_res=48", "splits=[motion]", "gallery=0")
    launch(evaluate, "my_run.yaml", *few, "checkpoint=runs/cnn", "output_dir=runs/cnn", "splits=[images]", "gallery=0")
    assert [line["step"] for line in learned(folder / "runs/cnn")] == [1, 2, 3]
    assert "It has vision_encoder.type=small_cnn and text_encoder.type=bert" in caplog.text
    assert "motion/" in json.loads((folder / "runs/cnn_temporal/evaluation/final/metrics.json").read_text())
    description = json.loads((resolve_weights("runs/cnn_temporal") / "model.json").read_text())["config"]
    assert description["plugins"] == ["my_backbone"]
    assert description["vision_encoder"]["options"] == {"channels": 48}
    assert export(["runs/cnn_temporal", "exported"]) == 0
    clip, larger = torch.randn(1, 2, 3, 48, 48), load_model("runs/cnn_temporal", {"image_res": 64})
    assert load_model("exported").encode_frames(clip)[0].shape == (1, 2, 1 + 3 * 3, 128)
    assert larger.encode_frames(torch.randn(1, 2, 3, 64, 64))[0].shape == (1, 2, 1 + 4 * 4, 128)


@pytest.mark.parametrize("mode", ["cpu fp32", "zero3 bf16"])
def test_it_trains_and_resumes_under_zero(shapes, tokenizer, tmp_path, mode):
    check_engine(page_model(shapes), "vision_encoder.layers", mode, tokenizer, tmp_path)


def test_its_work_is_counted_and_its_options_reach_it(shapes):
    model = build_model(page_model(shapes))
    convolutions = model.vision_encoder.layers[::3]
    assert [layer.out_channels for layer in convolutions] == [48, 96, 192, 128]
    products = sum(2 * layer.weight.numel() * size**2 for layer, size in zip(convolutions, (16, 8, 4, 2), strict=True))
    assert image_flops(model) == (products, 1 + 2 * 2)


@VISION("with_batch_norm")
class WithBatchNorm(VisionEncoder):
    def __init__(self, config):
        super().__init__()
        self.cut = nn.Conv2d(3, config.vision_encoder.width, 16, 16)
        self.norm = nn.BatchNorm2d(config.vision_encoder.width)

    def forward(self, images):
        tokens = self.norm(self.cut(images)).flatten(2).transpose(1, 2)
        return tokens, tokens.mean(1)


def test_batch_norm_is_refused_unless_frozen(shapes):
    config = page_model(shapes)
    config.vision_encoder = VisionConfig(type="with_batch_norm", width=128)
    model = build_model(config)
    with pytest.raises(UserError, match=r"vision_encoder\.norm is a BatchNorm2d, .* take GroupNorm or LayerNorm"):
        check_statistics(model)
    model.freeze(["vision_encoder.norm"])
    check_statistics(model)
