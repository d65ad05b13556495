"""docs/how-to/text-backbone.md, word for word: its module and YAML in a folder of one's own."""

import json

import pytest
import torch
from backbones import check_engine, launch, one_process, overrides, page_model, write_files  # noqa: F401
from small_run import learned

from launch.evaluate import main as evaluate
from launch.pretrain import main as pretrain
from model.building import build_model
from model.checkpoints.loading import load_model, save_model
from model.flops import text_flops
from model.probe import run_counted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The user's folder; one for all tests, because a process imports a module once."""
    folder = tmp_path_factory.mktemp("own")
    write_files("text-backbone", folder)
    return folder


@pytest.fixture(autouse=True)
def there(folder, monkeypatch, one_process):  # noqa: F811
    monkeypatch.chdir(folder)


def test_the_commands_of_the_page(shapes, folder):
    few = overrides(shapes)
    launch(pretrain, "my_run.yaml", *few, "output_dir=runs/conv", "log_every=1")
    own = "checkpoint=runs/conv", "output_dir=runs/conv"
    launch(evaluate, "my_run.yaml", *few, *own, "splits=[images]", "gallery=0")
    assert [line["step"] for line in learned(folder / "runs/conv")] == [1, 2, 3]
    assert "images/" in json.loads((folder / "runs/conv/metrics.json").read_text())
    assert load_model("runs/conv").text_encoder.layers[0].kernel_size == (3,)


@pytest.mark.parametrize("mode", ["cpu fp32", "zero3 bf16"])
def test_it_trains_and_resumes_under_zero(shapes, tokenizer, tmp_path, mode):
    check_engine(page_model(shapes), "text_encoder.layers", mode, tokenizer, tmp_path)


def test_questions_start_from_it(shapes, tmp_path):
    trained = build_model(page_model(shapes))
    save_model(trained, trained.config, tmp_path)
    model = load_model(tmp_path, {"answer_decoder.enable": True, "answer_decoder.num_layers": 2})
    decoder = model.answer_decoder
    assert torch.equal(decoder.embeddings.word_embeddings.weight, trained.text_encoder.word_embeddings.weight)
    for ours, theirs in zip(decoder.layer, trained.text_encoder.fusion_layers, strict=True):
        assert torch.equal(ours.output.dense.weight, theirs.output.dense.weight)
    frames, ids = torch.randn(2, 1, 3, 32, 32), torch.randint(5, 40, (2, 6))
    mask, each = torch.ones_like(ids), torch.ones(2, dtype=torch.long)
    assert model(frames, ids, mask, ids, mask, torch.ones(2), each)["loss_qa"].isfinite()


def test_padding_changes_nothing_and_its_work_is_counted(shapes):
    model = build_model(page_model(shapes)).eval()
    ids = torch.randint(5, 40, (1, 9))
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    padded, whole = model.text_encoder(ids, mask)[:, :6], model.text_encoder(ids[:, :6], mask[:, :6])
    torch.testing.assert_close(padded, whole)
    _, counted = run_counted(model.text_encoder, ids, mask)
    assert text_flops(model, 9) == counted > 0
