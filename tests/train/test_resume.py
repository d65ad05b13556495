"""An interrupted run resumes with the same command and equals an uninterrupted one."""

import random
import shutil
import signal
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file
from small_run import PRECISIONS, job, learned, metrics, run, run_jobs, start, start_jobs

from model.freezing import names_below
from model.singularity import TEMPERATURE_RANGE

pytestmark = pytest.mark.timeout(600)


def interrupt(launcher, folder, step, stop):
    """Call `stop` when the run has logged `step`, and wait until none of its processes is left."""
    deadline = time.monotonic() + 300
    while not any(line["step"] >= step for line in metrics(folder)):
        assert launcher.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes = psutil.Process(launcher.pid).children(recursive=True)
    stop(launcher)
    assert launcher.wait(60) != 0
    assert not psutil.wait_procs(processes, timeout=60)[1]
    assert not (folder / "finished.json").exists(), "the run ended before it could be interrupted"


def kill_all(launcher):
    """SIGKILL a launcher and every process below it, whose groups are their own."""
    for process in (*psutil.Process(launcher.pid).children(recursive=True), launcher):
        process.kill()


def weights(run, checkpoint):
    return load_file(run / f"checkpoints/{checkpoint}/weights/model.safetensors")


def same_weights(one, other, checkpoint):
    first, second = weights(one, checkpoint), weights(other, checkpoint)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def newest(folder):
    """The step of a run's newest checkpoint."""
    return max(int(path.name[5:]) for path in (folder / "checkpoints").glob("step_*"))


def test_terminated_and_killed_runs_equal_an_uninterrupted_one(corpora, tmp_path):
    config, log = corpora / "tiny.yaml", tmp_path / "log.txt"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    evaluating = "stop_key=images", "splits=[images]", "gallery=0"
    uninterrupted = run("pretrain", config, f"output_dir={whole}", *evaluating)
    assert uninterrupted.returncode == 0, uninterrupted.stderr

    # The signal goes to `deepspeed` alone, which dies of it; how many steps follow depends on the machine's speed.
    process = start("pretrain", config, f"output_dir={parts}", *evaluating, log=log)
    interrupt(process, parts, 3, lambda p: p.send_signal(signal.SIGTERM))
    stopped = newest(parts)
    assert f"at step {stopped}, saved: run the same command to resume" in log.read_text()
    process = start("pretrain", config, f"output_dir={parts}", *evaluating, log=log)
    interrupt(process, parts, stopped + 3, kill_all)
    assert f"Resuming the run in {parts} from step {stopped}" in log.read_text()
    again = run("pretrain", config, f"output_dir={parts}", *evaluating)
    assert again.returncode == 0, again.stderr

    steps = [line["step"] for line in learned(whole)]
    assert steps == list(range(1, 33))
    assert learned(parts) == learned(whole)
    assert same_weights(whole, parts, "step_00000032")
    assert same_weights(whole, parts, "best")
    evaluations = [[line for line in metrics(folder) if "evaluation" in line] for folder in (whole, parts)]
    assert [line["evaluation"] for line in evaluations[0]] == ["epoch_01", "epoch_02", "epoch_03", "epoch_04", "final"]
    assert evaluations[1] == evaluations[0]
    assert (parts / "finished.json").read_text() == (whole / "finished.json").read_text()
    assert "Traceback" not in log.read_text()

    finished = run("pretrain", config, f"output_dir={whole}", *evaluating, processes=1)
    assert finished.returncode == 2
    assert "is finished" in finished.stderr

    (whole / "finished.json").unlink()
    vocabulary = whole / f"checkpoints/step_{newest(whole):08}/weights/vocab.txt"
    vocabulary.write_bytes(b"")  # as a power cut leaves it
    emptied = run("pretrain", config, f"output_dir={whole}", *evaluating, processes=1)
    assert emptied.returncode == 2
    assert f"{vocabulary.parents[1]} is damaged ({vocabulary} has 0 bytes" in emptied.stderr


STEPS = 16
PARTS = ("vision_encoder", "text_encoder.layer.0")  # between parameters that are trained


def cut_off(whole, step):
    """A copy of a run as it was when it had just saved `step`; what it had logged since is still there."""
    part = whole.with_name(f"{whole.name}_resumed")
    shutil.copytree(whole, part)
    (part / "finished.json").unlink()
    for path in (part / "checkpoints").glob("step_*"):
        if path.name != f"step_{step:08}":
            shutil.rmtree(path)
    return part


KINDS = [(f"zero{stage}", precision) for stage in range(4) for precision in PRECISIONS]
FROZEN = [(zero, "bf16", *PARTS) for zero in ("zero1", "zero3")]


def launch(corpora, folder, kind):
    """A run of two epochs, 16 steps, under a ZeRO stage and in a precision; the temperature is to be clamped."""
    zero, precision, *freeze = kind
    return job(
        "pretrain", corpora / "tiny.yaml", f"output_dir={folder}", f"deepspeed=deepspeed_configs/{zero}.json",
        f"precision={precision}", "scheduler.epochs=2", "keep_checkpoints=9", "temp=0.9",
        f"freeze=[{','.join(freeze)}]",
    )  # fmt: skip


def check_same(whole, part):
    assert [line["step"] for line in learned(whole)] == list(range(1, STEPS + 1))
    assert learned(part) == learned(whole), whole.name
    assert same_weights(whole, part, f"step_{STEPS:08}"), whole.name
    low, high = TEMPERATURE_RANGE
    assert low <= weights(whole, f"step_{STEPS:08}")["temp"].item() <= high, whole.name


def test_every_zero_stage_and_precision_resumes_to_the_bit(corpora, tmp_path):
    kinds = [kind for kind in KINDS if kind not in (("zero1", "fp16"), ("zero2", "fp16"))] + FROZEN  # like the others
    runs = {kind: tmp_path / "_".join(kind) for kind in kinds}
    run_jobs(tmp_path, [launch(corpora, folder, kind) for kind, folder in runs.items()])
    resumed = {kind: cut_off(whole, 5) for kind, whole in runs.items()}
    run_jobs(tmp_path, [launch(corpora, folder, kind) for kind, folder in resumed.items()])
    for kind in kinds:
        check_same(runs[kind], resumed[kind])
        if kind[1] == "fp16":  # the search for the loss scale is not begun again
            assert all(line["grad_scale"] < 2**16 for line in learned(resumed[kind])[5:])
        first, last = (weights(resumed[kind], f"step_{step:08}") for step in (5, STEPS))
        unchanged = {name for name in first if torch.equal(first[name], last[name])}
        frozen = names_below(first.keys(), PARTS if kind in FROZEN else (), "freeze")
        assert frozen <= unchanged
        assert len(unchanged) < len(first) - 10


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_any_step_every_stage_and_precision_resumes_to_the_bit(corpora, tmp_path):
    whole = {kind: tmp_path / "_".join(kind) for kind in KINDS}
    killed = {kind: tmp_path / f"{'_'.join(kind)}_killed" for kind in KINDS}
    run_jobs(tmp_path, [launch(corpora, folder, kind) for kind, folder in whole.items()])
    steps = random.Random(7)
    for kind, folder in killed.items():
        process = start_jobs(tmp_path, [launch(corpora, folder, kind)])
        interrupt(process, folder, steps.randrange(5, 15), kill_all)
    run_jobs(tmp_path, [launch(corpora, folder, kind) for kind, folder in killed.items()])
    for kind in KINDS:
        check_same(whole[kind], killed[kind])
