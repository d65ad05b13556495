"""Evaluation between and after epochs when ZeRO-3 has cut the parameters to pieces."""

import json

import pytest
from small_run import run

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]


def test_fine_tuning_under_zero_3_evaluates_what_it_saves(corpora, tmp_path):
    folder = tmp_path / "run"
    settings = ("deepspeed=deepspeed_configs/zero3.json", "scheduler.epochs=2", "stop_key=images", "k_test=3")
    # Of eight pictures one rank encodes five batches of one, the other three: unequal numbers of forward passes.
    sizes = ("batch_size_test.image=1", "batch_size_test.video=3", "pair_batch_size=8")
    result = run("finetune_retrieval", corpora / "tiny.yaml", f"output_dir={folder}", *settings, *sizes)
    assert result.returncode == 0, result.stderr + result.stdout
    final = json.loads((folder / "evaluation/final/metrics.json").read_text())
    where = (f"checkpoint={folder}", f"output_dir={folder}", "label=again", "k_test=3")
    result = run("evaluate", corpora / "tiny.yaml", *where, processes=1)
    assert result.returncode == 0, result.stderr
    assert json.loads((folder / "evaluation/again/metrics.json").read_text()) == final
