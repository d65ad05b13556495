"""docs/how-to/evaluation-task.md, word for word: evaluated, trained with, and reported."""

import json
import re
from dataclasses import replace

import pytest
from blocks import blocks

from eval.outputs import write_evaluation
from eval.report.page import write_report
from eval.run import TASKS, evaluate_splits, make_task
from eval.tasks.task import TaskResult
from loaders.evaluation import VisualSet
from model import Singularity
from runtime.errors import UserError
from runtime.ranks import ALONE
from tests.eval.small import small_model
from tests.train.small_run import job, make_corpora, run_jobs
from train.config.settings import load_settings
from train.loop import deciding_score


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder with the files of the page."""
    folder = tmp_path_factory.mktemp("user")
    for name, content in blocks("evaluation-task").items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def run(folder, shapes, monkeypatch):
    monkeypatch.chdir(folder)
    test = f"test_corpus={{images: {shapes.url('images_test')}, clips: {shapes.url('clips_test_appearance')}}}"
    return load_settings("my_run.yaml", [test, "image_res=32", "max_txt_l={image: 24, video: 24}"]).config


def test_page_evaluates_and_reports(run, folder, shapes, tokenizer):
    model = small_model(tokenizer)
    metrics = evaluate_splits(make_task(run), model, tokenizer, run, ALONE, run.test_urls(), folder / "evaluation")
    assert set(metrics) == {"images", "clips"}
    assert json.loads((folder / "evaluation/metrics.json").read_text()) == metrics
    details = json.loads((folder / "evaluation/evaluation.json").read_text())
    assert details["task"] == "zero_shot"
    assert details["settings"]["task_options"]["classes"] == ["black", "gray", "white"]
    page = (folder / "evaluation/report.html").read_text()
    for values in metrics.values():
        assert f'title="{values["overall"]:.2f} %' in page
    assert deciding_score(metrics, "images") == ("overall", metrics["images"]["overall"])


def test_accuracy_is_that_of_the_classes_in_the_captions(run, shapes, tokenizer):
    task = make_task(run)
    model = small_model(tokenizer)
    dataset = task.open(shapes.url("images_test"), run)
    result = task.evaluate(model, dataset, tokenizer, run, 1, ALONE)
    own = small_model(tokenizer, Singularity)
    own.load_state_dict(model.state_dict())
    own.tokenizer = tokenizer
    files = [shapes.folder / "media" / source for source in dataset.sources]
    classes = ["black", "gray", "white"]
    texts = own.encode_texts([f"a picture on a {name} background" for name in classes])
    chosen = [classes[i] for i in (own.encode_images(files) @ texts.T).argmax(1)]
    records = json.loads((shapes.folder / "images_test.json").read_text())
    caption = {record["image"]: " ".join(record["caption"]) for record in records}
    right = [name in caption[source].split() for name, source in zip(chosen, dataset.sources)]
    assert result.metrics[dataset.name]["overall"] == round(100 * sum(right) / len(right), 2)


def test_page_trains_and_evaluates_in_two_processes(folder, tmp_path):
    """The task's metric chooses the best checkpoint, whose weights name their corpora."""
    corpora = make_corpora(tmp_path)
    for name in blocks("evaluation-task"):
        text = (folder / name).read_text().replace("configs/demo/finetune.yaml", str(corpora / "tiny.yaml"))
        (tmp_path / name).write_text(text)
    where, mine = [f"data_root={corpora}"], tmp_path / "mine"
    short = ["scheduler.epochs=1", "max_steps=2", f"output_dir={mine}"]
    train = job("finetune_retrieval", tmp_path / "my_run.yaml", *where, *short)
    again = [f"checkpoint={mine}", f"output_dir={tmp_path / 'again'}"]
    output = run_jobs(tmp_path, [train, job("evaluate", tmp_path / "my_run.yaml", *where, *again)])
    metrics = json.loads((mine / "evaluation/final/metrics.json").read_text())
    assert re.search(r"Best so far: images overall \d+\.\d\d", output)
    logged = [json.loads(line) for line in (mine / "metrics.jsonl").read_text().splitlines()]
    assert any(metrics["images"]["overall"] in line.values() for line in logged)
    assert json.loads((tmp_path / "again/metrics.json").read_text()) == metrics
    weights = json.loads((mine / "checkpoints/best/weights/model.json").read_text())
    assert [each["name"] for each in weights["preprocessing"]["corpora"]] == ["images_train", "clips_train"]
    assert weights["preprocessing"]["corpora"][1]["fps"] == 4.0


def test_other_metrics_have_columns_and_missing_visuals_a_warning(run, shapes, tmp_path):
    task = make_task(run)
    outputs = []
    for name in ("images_test", "clips_test_appearance"):
        dataset = VisualSet(shapes.url(name), run)
        dataset.name = name
        result = TaskResult(name=name, num_frames=2, metrics={name: {"top1": 12.5, "top5": 62.5}}, missing={3: "lost"})
        outputs.append(task.output(result, dataset, run))
    write_evaluation(tmp_path / "a", outputs, run)
    page = write_report([tmp_path / "a"], tmp_path / "report.html").read_text()
    assert page.count('title="62.50 %') == 2
    assert "1 of 24 images could not be read" in page
    assert deciding_score({"images": {"top1": 12.5, "top5": 62.5}}, "images") == ("top1", 12.5)


def test_metrics_by_other_names_than_the_splits_are_refused(run, folder, shapes, tokenizer):
    class Renamed(TASKS["zero_shot"]):
        def evaluate(self, model, dataset, *rest):
            result = super().evaluate(model, dataset, *rest)
            return replace(result, metrics={f"{dataset.name}/accuracy": result.metrics[dataset.name]})

    message = r"task=zero_shot returned metrics named images/accuracy: return one entry named dataset\.name with all"
    with pytest.raises(UserError, match=message):
        evaluate_splits(Renamed(run), small_model(tokenizer), tokenizer, run, ALONE, ["images"], folder / "renamed")
    with pytest.raises(UserError, match="stop_key=images has no metrics: name a split that has some, or stop_key=null"):
        deciding_score({"images": {}}, "images")


def test_unknown_tasks_are_refused_with_the_names_there_are(run):
    run.task = "retreival"
    with pytest.raises(UserError, match=r"task is 'retreival', must be one of retrieval, .*qa.*; a module"):
        make_task(run)
    assert {"retrieval", "qa", "choice", "zero_shot"} <= set(TASKS)
