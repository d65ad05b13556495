"""A run that is interrupted goes on, with the same command, as if nothing had happened."""

import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from small_run import metrics, run, start

pytestmark = pytest.mark.timeout(300)
VARYING = ("samples_per_second", "data_wait")


def learned(folder):
    """What a run has logged, without times."""
    return [{key: value for key, value in line.items() if key not in VARYING} for line in metrics(folder)]


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
