"""Watching a run: the progress line, a profiler's trace of some steps, the loader's counters, memory."""

import json
import re
from collections import Counter

import pytest
import torch
from small_run import job, metrics, run_jobs

from train.config.settings import RunConfig
from train.tracking.profiling import StepProfiler
from train.tracking.trackers import step_line

GROUPS = 2  # of parameters, with weight decay and without; ZeRO's steps are taken group by group


@pytest.fixture(scope="module")
def watched(corpora, tmp_path_factory):
    """The folder of a run of 6 steps on two processes, 3 and 4 of them profiled, and what it showed."""
    folder = tmp_path_factory.mktemp("watched")
    settings = (f"output_dir={folder}/run", "max_steps=6", "profile_steps=[3,4]")
    shown = run_jobs(folder, [job("pretrain", corpora / "tiny.yaml", *settings)])
    return folder / "run", shown


def test_the_progress_line_says_how_a_run_is_doing(watched):
    folder, shown = watched
    number = r"\d+\.\d+"
    line = re.compile(
        rf"step (\d)/6 epoch 0 (?:image|video) \| loss {number} \(itc {number} itm {number} mlm {number}\) "
        rf"\| lr \d\.\d\de-\d\d \| temp {number} \| grad {number} \| \d+/s \| wait \d+% \| {number} GB "
        r"\| [\d.]+ (?:s|min) left"
    )
    assert line.findall(shown) == list("123456")
    assert line.findall((folder / "log.txt").read_text()) == list("123456")


def test_the_share_of_a_gpus_arithmetic_is_shown_where_it_is_known():
    figures = {
        "step": 1, "epoch": 0, "media_type": "image", "loss": 1.0, "lr": 1e-4, "temperature": None, "grad_norm": None,
        "samples_per_second": 900.0, "data_wait": 0.014, "memory_gb": 40.0, "mfu": 0.412, "skipped": 2,
    }  # fmt: skip
    assert step_line(figures, 10).endswith("900/s | wait 1% | 40.0 GB | MFU 41.2% | skipped 2")


def traced(path):
    """How often a trace holds each (category, name)."""
    return Counter((event.get("cat"), event.get("name")) for event in json.loads(path.read_text())["traceEvents"])


def test_the_trace_holds_the_steps_that_were_asked_for(watched):
    folder, shown = watched
    traces = sorted((folder / "profile").iterdir())
    assert [path.name for path in traces] == ["steps_3_4_rank_0.json", "steps_3_4_rank_1.json"]
    assert f"Trace of steps 3 to 4: {traces[0]}" in shown
    for path in traces:
        assert traced(path)["user_annotation", "Optimizer.step#AdamW.step"] == 2 * GROUPS
        assert traced(path)["cpu_op", "aten::scaled_dot_product_attention"] > 2


def test_a_run_that_ends_among_them_leaves_what_there_is(tmp_path, caplog):
    caplog.set_level("INFO", "train")
    profiler = StepProfiler([3, 9], tmp_path / "profile", 0, torch.device("cpu"))
    profiler.before(3)
    torch.ones(2).sum()
    profiler.after(3)
    profiler.close()
    (path,) = (tmp_path / "profile").iterdir()
    assert f"Trace of steps 3 to 3: {path}" in caplog.text
    assert traced(path)["cpu_op", "aten::sum"]


@pytest.mark.parametrize("steps", [[3], [4, 3], [0, 2]])
def test_steps_that_cannot_be_traced_are_refused(steps):
    with pytest.raises(ValueError, match=r"profile_steps is .*: must be the first and the last step"):
        RunConfig(profile_steps=steps)


def test_the_loaders_counters_are_logged_beside_the_losses(watched):
    steps = [line for line in metrics(watched[0]) if "loss" in line]
    read = [line["loader/bytes_read"] for line in steps]
    assert read == sorted(read)
    assert read[0] > 0
    assert all(0 <= line["loader/decode_ready"] <= 1 for line in steps)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_is_flat_over_500_steps(corpora, tmp_path):
    settings = ("scheduler.epochs=100", "max_steps=500", "log_every=10", "save_every=100", "keep_checkpoints=1")
    run_jobs(tmp_path, [job("pretrain", corpora / "tiny.yaml", f"output_dir={tmp_path}/run", *settings)], timeout=800)
    used = {line["step"]: line["memory_gb"] for line in metrics(tmp_path / "run") if "memory_gb" in line}
    early = max(value for step, value in used.items() if 100 <= step <= 200)
    assert max(value for step, value in used.items() if step >= 400) <= 1.02 * early, used
