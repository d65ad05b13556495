"""A run that is interrupted goes on, with the same command, as if nothing had happened."""

import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from small_run import job, learned, metrics, run, run_jobs, start

pytestmark = pytest.mark.timeout(300)


def interrupt(process, folder, step, stop):
    """Call `stop` when the run has logged `step`; returns the exit code."""
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in metrics(folder)):
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    stop(process)
    return process.wait(60)


def test_terminated_and_killed_runs_equal_an_uninterrupted_one(corpora, tmp_path):
    config, log = corpora / "tiny.yaml", tmp_path / "log.txt"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    uninterrupted = run("pretrain", config, f"output_dir={whole}")
    assert uninterrupted.returncode == 0, uninterrupted.stderr

    process = start("pretrain", config, f"output_dir={parts}", log=log)
    assert interrupt(process, parts, 6, lambda p: p.send_signal(signal.SIGTERM)) != 0
    process = start("pretrain", config, f"output_dir={parts}", log=log)
    assert interrupt(process, parts, 17, lambda p: os.killpg(p.pid, signal.SIGKILL)) != 0
    again = run("pretrain", config, f"output_dir={parts}")
    assert again.returncode == 0, again.stderr

    steps = [line["step"] for line in learned(whole)]
    assert steps == list(range(1, 33))
    assert learned(parts) == learned(whole)
    first, second = (load_file(f / "checkpoints/step_00000032/weights/model.safetensors") for f in (whole, parts))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    text = log.read_text()
    assert "the same command goes on from there" in text
    assert "Going on with the run" in text
    assert "Traceback" not in text

    finished = run("pretrain", config, f"output_dir={whole}", processes=1)
    assert finished.returncode == 2
    assert "is finished" in finished.stderr


STEPS = 16


def same_weights(*runs):
    first, second = (load_file(run / f"checkpoints/step_{STEPS:08}/weights/model.safetensors") for run in runs)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def cut_off(whole, step):
    """A copy of a run as it was when it had just saved `step`; what it had logged since is still there."""
    part = whole.with_name(f"{whole.name}_resumed")
    shutil.copytree(whole, part)
    (part / "finished.json").unlink()
    for path in (part / "checkpoints").glob("step_*"):
        if path.name != f"step_{step:08}":
            shutil.rmtree(path)
    return part


def test_every_zero_stage_and_precision_resumes_to_the_bit(corpora, tmp_path):
    kinds = [(f"zero{stage}", precision) for stage in range(4) for precision in ("fp32", "bf16")]

    def launches(suffix=""):
        return [
            job(
                "pretrain", corpora / "tiny.yaml", f"output_dir={tmp_path}/{zero}_{precision}{suffix}",
                f"deepspeed=deepspeed_configs/{zero}.json", f"precision={precision}",
                "scheduler.epochs=2", "keep_checkpoints=9",
            )
            for zero, precision in kinds
        ]  # fmt: skip

    run_jobs(tmp_path, launches())
    runs = [tmp_path / f"{zero}_{precision}" for zero, precision in kinds]
    resumed = [cut_off(whole, 5) for whole in runs]
    run_jobs(tmp_path, launches("_resumed"))
    for whole, part in zip(runs, resumed):
        assert [line["step"] for line in learned(whole)] == list(range(1, STEPS + 1))
        assert learned(part) == learned(whole), whole.name
        assert same_weights(whole, part), whole.name
