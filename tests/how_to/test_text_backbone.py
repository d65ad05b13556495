"""docs/how-to/text-backbone.md, word for word: its module and YAML in a folder of one's own."""

import json

import pytest
import torch
from backbones import check_engine, one_process, overrides, page_model, write_files  # noqa: F401
from small_run import job, learned, run_jobs

from model.building import build_model
from model.checkpoints.loading import load_model
from model.flops import text_flops
from model.probe import run_counted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The user's folder; one for all tests, because a process imports a module once."""
    folder = tmp_path_factory.mktemp("own")
    write_files("text-backbone", folder)
    return folder


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_the_commands_of_the_page(shapes, folder):
    few = overrides(shapes)
    jobs = [
        job("pretrain", "my_run.yaml", *few, "output_dir=runs/conv", "log_every=1"),
        job("evaluate", "my_run.yaml", *few, "checkpoint=runs/conv", "output_dir=runs/conv", "splits=[images]"),
        job(
            "finetune_qa", "configs/small/qa.yaml", *few, "pretrained_path=runs/conv", "output_dir=runs/qa",
            f"train_corpus={shapes.shards}/qa_train", f"test_corpus.questions={shapes.shards}/qa_test",
            f"answer_list={shapes.folder}/answer_list.json", "splits=[questions]", "video_input.num_frames=1",
        ),
    ]  # fmt: skip
    run_jobs(folder, jobs, processes=1)
    assert [line["step"] for line in learned(folder / "runs/conv")] == [1, 2, 3]
    assert list((folder / "runs/conv/evaluation").glob("*/metrics.json"))
    assert "questions" in json.loads((folder / "runs/qa/evaluation/final/metrics.json").read_text())
    assert load_model("runs/conv").text_encoder.layers[0].kernel_size == (3,)


@pytest.mark.parametrize("zero, precision", [("cpu", "fp32"), ("zero3", "fp32"), ("zero3", "bf16")])
def test_it_trains_and_resumes_under_zero(one_process, shapes, tokenizer, tmp_path, zero, precision):  # noqa: F811
    check_engine(page_model(shapes), zero, precision, tokenizer, tmp_path)


def test_padding_changes_nothing_and_its_work_is_counted(shapes):
    model = build_model(page_model(shapes)).eval()
    ids = torch.randint(5, 40, (1, 9))
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    padded, whole = model.text_encoder(ids, mask)[:, :6], model.text_encoder(ids[:, :6], mask[:, :6])
    torch.testing.assert_close(padded, whole)
    _, counted = run_counted(model.text_encoder, ids, mask)
    assert text_flops(model, 9) == counted > 0
