"""What a run writes about its steps."""

import importlib.util
import json
import math
import struct
import time

import pytest
from needs import module
from PIL import Image

from model.config import LossWeights
from train.config.settings import RunConfig
from train.folder import RunFolder
from train.tracking.trackers import Tracker, check_tracking, drop_after

FIGURES = {
    "epoch": 0, "media_type": "image", "loss": 3.0, "loss_itc": 1.0, "loss_itm": 2.0, "lr": 1e-4,
    "temperature": 0.07, "grad_norm": 1.5, "samples_per_second": 12.3, "data_wait": 0.01,
    "memory_gb": 1.5, "mfu": None,
}  # fmt: skip


@pytest.fixture
def tracked(tmp_path):
    """Opens a tracker of tmp_path, with `settings`, lets the caller log, and closes it; the lines of metrics.jsonl."""

    def track(*log, step=0, **settings):
        tracker = Tracker(RunFolder(tmp_path), RunConfig(**settings), total_steps=10, step=step)
        for call in log:
            call(tracker)
        tracker.close()
        return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    return track


def steps(*numbers, **changed):
    """Calls that log training steps."""
    return [lambda tracker, step=step: tracker.step({"step": step, **FIGURES, **changed}) for step in numbers]


def test_lines_beyond_the_checkpoint_are_dropped(tracked, tmp_path, caplog):
    with caplog.at_level("INFO", "train"):
        tracked(*steps(1, 2, 3, 4, 5))
    assert "step 1/10 epoch 0 image | loss 3.000 (itc 1.000 itm 2.000) | lr 1.00e-04" in caplog.messages[0]
    assert caplog.messages[-1].endswith("| 0 s left")
    assert [line["step"] for line in tracked(*steps(4), step=3)] == [1, 2, 3, 4]
    assert not (tmp_path / "tensorboard").exists()  # unless it is asked for


def test_weights_of_losses_are_logged_once_where_they_are_not_1(tracked, caplog):
    caplog.set_level("INFO", "train")
    tracked()
    assert not caplog.messages
    tracked(loss_weight=LossWeights(itc=2.0, mlm=0.5))
    reported = "Logged losses are multiplied by their weights: loss_itc x 2, loss_mlm x 0.5; loss is their sum"
    assert caplog.messages == [reported]


def test_evaluations_that_are_made_again_and_a_line_cut_short_are_dropped(tracked, tmp_path):
    def evaluation(step, label):
        return lambda tracker: tracker.evaluation(step, 1, {"val/": {"r_mean": 50.0}}, tmp_path / label)

    tracked(*steps(2), evaluation(2, "epoch_01"), *steps(4), evaluation(4, "epoch_02"), evaluation(4, "final"))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "lo')
    drop_after(path, 4, evaluated_epochs=1)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 2, 4]
    drop_after(tmp_path / "none.jsonl", 10)


def test_what_json_has_no_word_for_becomes_null(tracked):
    metrics = {"val/": {"r_mean": 50.0}, "val_emb/": {"r_mean": 40.0}}
    log = [*steps(1, loss=float("nan"), grad_norm=float("inf")), lambda tracker: tracker.evaluation(1, 1, metrics)]
    first, second = tracked(*log)
    assert first["loss"] is first["grad_norm"] is None
    assert second == {"step": 1, "epoch": 1, "val/r_mean": 50.0, "val_emb/r_mean": 40.0}


BLOCK, HEADER = 32768, 7  # of the log format that .wandb files have, LevelDB's


def records(folder):
    """What Weights & Biases has stored under `folder`, oldest run first."""
    found = []
    for path in sorted(folder.rglob("*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        content, place, whole = path.read_bytes(), HEADER, b""
        while place + HEADER <= len(content):
            if BLOCK - place % BLOCK < HEADER:
                place += BLOCK - place % BLOCK
                continue
            length, kind = struct.unpack_from("<HB", content, place + 4)
            whole += content[place + HEADER : place + HEADER + length]
            place += HEADER + length
            if kind in (1, 4):  # a whole record, or the last part of one
                found.append(module("wandb.proto.wandb_internal_pb2", "wandb").Record.FromString(whole))
                whole = b""
    return found


def test_wandb_offline_receives_settings_losses_and_pictures(tmp_path, monkeypatch):
    module("wandb", "wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = RunConfig(seed=77)
    run.wandb.enable, run.wandb.mode = True, "offline"
    report = tmp_path / "evaluation/final"
    (report / "thumbnails").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(report / "thumbnails/clip-000001.jpg")
    (report / "report.html").write_text("<h1>Evaluation</h1>")
    for start in (0, 1):  # the second time after an interruption
        tracker = Tracker(RunFolder(tmp_path), run, total_steps=10, step=start)
        tracker.step({"step": start + 1, **FIGURES, "loss": 3.0 - start})
        if start:
            tracker.evaluation(start + 1, 1, {"val/": {"r_mean": 50.0}}, report)
        tracker.close()
        time.sleep(1.1)  # the name of wandb's folder has the second

    stored = records(tmp_path)
    runs = [record.run for record in stored if record.HasField("run")]
    assert {each.run_id for each in runs} == {(tmp_path / "wandb_id.txt").read_text()}
    settings = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert settings["seed"] == 77
    assert settings["optimizer.lr"] == 1e-4
    history = [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in stored
        if record.HasField("history")
    ]
    assert [line["loss"] for line in history if "loss" in line] == [3.0, 2.0]
    assert [line["val/r_mean"] for line in history if "val/r_mean" in line] == [50.0]
    (line,) = [line for line in history if "final/pictures._type" in line]
    assert line["final/pictures.captions"] == ["clip-000001"]
    (name,) = line["final/pictures.filenames"]
    (path,) = [path for path in tmp_path.rglob("*.jpg") if path.name == name.rpartition("/")[2]]
    with Image.open(path) as picture:
        assert picture.size == (40, 30)
    assert any(path.suffix == ".html" and "Evaluation" in path.read_text() for path in tmp_path.rglob("final/report_*"))


READER = "tensorboard.backend.event_processing.event_accumulator"


def scalars(folder):
    """{figure: [(step, value)]} of a run's event files, as TensorBoard shows them."""
    accumulator = module(READER, "tensorboard")
    shown = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def test_tensorboard_shows_what_metrics_jsonl_holds(tracked, tmp_path):
    module("tensorboard", "tensorboard")
    tracked(*steps(1, 2, 3, 4, loss=2.0, grad_norm=math.inf), tensorboard=True)
    evaluation = [lambda tracker: tracker.evaluation(5, 1, {"val/": {"r_mean": 50.0}})]
    resumed = [*steps(3, 4, 5, loss=1.0), *evaluation]
    lines = tracked(*resumed, step=2, tensorboard=True)  # killed without a word after step 4
    shown = scalars(tmp_path)
    assert shown["loss"] == [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert len(shown["loss"]) == 5
    assert shown["val/r_mean"] == [(5, 50.0)]
    assert {"loss_itc", "lr", "temperature", "samples_per_second", "data_wait", "memory_gb", "epoch"} <= shown.keys()
    assert [step for step, _ in shown["grad_norm"]] == [3, 4, 5]
    assert not {"step", "media_type", "mfu"} & shown.keys()


@pytest.mark.parametrize("setting", ["tensorboard", "wandb.enable"])
def test_a_tracker_that_is_not_installed_is_reported_at_once(setting, monkeypatch):
    run = RunConfig(tensorboard=setting == "tensorboard")
    run.wandb.enable = setting == "wandb.enable"
    package = setting.partition(".")[0]
    module(package, package)
    check_tracking(run)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(ValueError, match=rf"{setting} is true and {package} is not installed: pip install {package}"):
        check_tracking(run)
