"""What a run writes about its steps."""

import json

from train.config import RunConfig
from train.folder import RunFolder
from train.tracking import Tracker, drop_after

FIGURES = {
    "epoch": 0, "media_type": "image", "loss": 3.0, "loss_itc": 1.0, "loss_itm": 2.0, "lr": 1e-4,
    "temperature": 0.07, "grad_norm": 1.5, "samples_per_second": 12.3, "data_wait": 0.01,
    "memory_gb": 1.5, "mfu": None,
}  # fmt: skip


def steps(folder):
    return [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()]


def test_lines_beyond_the_checkpoint_are_dropped(tmp_path, caplog):
    folder = RunFolder(tmp_path)
    tracker = Tracker(folder, RunConfig(), total_steps=10, step=0)
    with caplog.at_level("INFO", "train"):
        for step in range(1, 6):
            tracker.step({"step": step, **FIGURES})
    tracker.close()
    assert "step 1/10 epoch 0 image | loss 3.000 (itc 1.000 itm 2.000) | lr 1.00e-04" in caplog.messages[0]
    assert caplog.messages[-1].endswith("0:00:00 left")
    tracker = Tracker(folder, RunConfig(), total_steps=10, step=3)
    tracker.step({"step": 4, **FIGURES})
    tracker.close()
    assert steps(folder) == [1, 2, 3, 4]


def test_a_line_cut_short_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    drop_after(path, 10)
    assert path.read_text() == '{"step": 1}\n'
    drop_after(tmp_path / "none.jsonl", 10)


def test_what_json_has_no_word_for_becomes_null(tmp_path):
    folder = RunFolder(tmp_path)
    tracker = Tracker(folder, RunConfig(), total_steps=10, step=0)
    tracker.step({"step": 1, **FIGURES, "loss": float("nan"), "grad_norm": float("inf")})
    tracker.evaluation(1, 1, {"val/": {"r_mean": 50.0}, "val_emb/": {"r_mean": 40.0}})
    tracker.close()
    first, second = (json.loads(line) for line in folder.metrics.read_text().splitlines())
    assert first["loss"] is None
    assert first["grad_norm"] is None
    assert second == {"step": 1, "epoch": 1, "val/r_mean": 50.0, "val_emb/r_mean": 40.0}


def test_wandb_offline_keeps_the_run_and_its_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = RunConfig()
    run.wandb.enable, run.wandb.mode = True, "offline"
    identities = []
    for start in (0, 1):
        tracker = Tracker(RunFolder(tmp_path), run, total_steps=10, step=start)
        tracker.step({"step": start + 1, **FIGURES})
        tracker.close()
        identities.append((tmp_path / "wandb_id.txt").read_text())
    assert identities[0] == identities[1]
    assert list(tmp_path.rglob("*.wandb"))
