"""docs/how-to/loss.md, word for word: its module and YAML in a folder of one's own, on two processes under ZeRO 3."""

from pathlib import Path

import pytest
from blocks import blocks
from small_run import job, learned, run_jobs

from eval.report.evaluations import Evaluation
from eval.report.tables import loss_curves
from model.checkpoints.loading import load_model, load_weights
from model.export import main as export
from train.plot import write_plot

SMALL = (
    "vision_encoder.width=32", "vision_encoder.depth=1", "text_encoder.width=32", "text_encoder.layers=2",
    "text_encoder.intermediate=64", "image_res=32", "embed_dim=16", "batch_size={image: 8, video: 8}", "log_every=1",
    "scheduler.epochs=1", "scheduler.warmup_epochs=0", "max_steps=4", "deepspeed=deepspeed_configs/zero3.json",
)  # fmt: skip
OWN_TENSORS = {"losses.sigmoid.scale", "losses.sigmoid.bias"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shapes) -> Path:
    """The run of the page, in a folder with the page's files."""
    folder = tmp_path_factory.mktemp("own")
    for name, content in blocks("loss").items():
        (folder / name).write_text(content)
    where = (f"data_root={shapes.shards}", f"tokenizer={shapes.vocab}", f"output_dir={folder}/run")
    run_jobs(folder, [job("pretrain", folder / "my_run.yaml", *where, *SMALL)])
    return folder / "run"


def test_the_losses_are_logged_trained_and_saved(run: Path) -> None:
    lines = learned(run)
    assert len(lines) == 4
    names = ["loss_itc", "loss_itm", "loss_mlm", "loss_uniformity", "loss_sigmoid"]
    for line in lines:
        assert [name for name in line if name.startswith("loss_")] == names
        assert line["loss"] == pytest.approx(sum(line[name] for name in names), rel=1e-5)
    assert lines[0]["loss_sigmoid"] == pytest.approx(0.5 * 10, abs=2.5)  # its weight times the bias
    weights = load_weights(run)
    assert weights.config.losses == {"uniformity": 0.1, "sigmoid": 0.5}
    assert weights.config.plugins == ["my_losses"]
    assert -10.1 < weights.state["losses.sigmoid.bias"].item() != -10


def test_plots_and_reports_show_them(run: Path) -> None:
    shown = ["loss", "loss_itc", "loss_itm", "loss_mlm", "loss_uniformity", "loss_sigmoid"]
    assert write_plot([run], run / "plot.png")[:6] == shown
    (curves, *_) = loss_curves([Evaluation(run / "evaluation/final", run, {}, {}, {}, "run")])
    assert {"uniformity (x 0.1)", "sigmoid (x 0.5)"} <= curves["last"].keys()


def test_evaluation_and_export_do_without_them(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no my_losses.py
    assert not list(load_model(run).losses.parameters())
    assert export([str(run), "official.pth"]) == 0
    official = load_weights("official.pth")
    assert official.config.losses == {}
    assert load_weights(run).state.keys() - official.state.keys() == OWN_TENSORS
