"""A job that hangs exits, and names the rank that is the cause and its step."""

import contextlib
import os
import re
import shutil
import signal
import time

import psutil
import pytest
from small_run import job, metrics, run, run_jobs, start, start_jobs

from train.job.watchdog import EXIT_CODE

pytestmark = pytest.mark.timeout(300)


def one_process(launcher, rank):
    """The training process of a rank below `deepspeed`."""
    for process in psutil.Process(launcher.pid).children(recursive=True):
        words = process.cmdline()
        if any(word.endswith("launch/pretrain.py") for word in words) and f"--local_rank={rank}" in words:
            return process
    raise AssertionError("no such rank")


@pytest.mark.parametrize("what", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_killed_or_halted_rank_brings_the_job_down(corpora, tmp_path, what):
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    seconds = 5 if what == signal.SIGSTOP else 40  # a loaded machine may need long to see that a process has gone
    settings = ("scheduler.epochs=400", "save_every=10000", f"stall_seconds={seconds}", f"output_dir={folder}")
    launcher = start("pretrain", corpora / "tiny.yaml", *settings, log=log)
    try:
        while not any(line["step"] >= 5 for line in metrics(folder)):
            assert launcher.poll() is None, log.read_text()
            time.sleep(0.05)
        one_process(launcher, 1).send_signal(what)
        began = time.monotonic()
        assert launcher.wait(60) != 0
        assert time.monotonic() - began < 45
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    text = log.read_text()
    assert "rank 1 (" in text
    if what == signal.SIGKILL:
        assert "is gone, last" in text  # step, or report where it sent no heartbeat since its first steps
    else:
        assert re.search(r"sent no heartbeat for .* waiting for it in a collective: rank 0 in \w+", text)
        assert "Thread" in (folder / "stacks_rank_0.txt").read_text()


def test_a_loader_that_hangs_is_named(corpora, tmp_path):
    """A shard that cannot be read, as on a file system that has gone: a pipe that nobody writes into."""
    stuck = tmp_path / "images"
    shutil.copytree(corpora / "images_train", stuck)
    for tar in stuck.glob("*.tar"):
        tar.unlink()
        os.mkfifo(tar)
    settings = (f"train_corpus={stuck}", f"output_dir={tmp_path}/run", "stall_seconds=4")
    result = run("pretrain", corpora / "tiny.yaml", *settings, processes=1)
    assert result.returncode == EXIT_CODE, result.stderr
    assert "rank 0 (" in result.stdout
    assert "has waited for its loader for" in result.stdout
    assert "prefetch.py" in (tmp_path / "run/stacks_rank_0.txt").read_text()


def halted(folder, job, halt, *written, until=r"The job hangs: (.*)", seconds=120):
    """Start a job in `folder` that comes to a halt, until it shows `until` and has `written` files; what it shows."""
    launcher = start_jobs(folder, [job], worker="faulty_worker.py", FAULT=halt)
    began = time.monotonic()
    try:
        while not (found := re.search(until, (folder / "shown.txt").read_text())) or not all(
            path.is_file() and path.stat().st_size for path in written
        ):
            assert time.monotonic() - began < seconds, (folder / "shown.txt").read_text()
            time.sleep(0.2)
        return found[1]
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(launcher.pid).children(recursive=True):
                process.kill()
        launcher.kill()
        launcher.wait()


def test_a_collective_that_hangs_is_reported_with_the_rank_that_did_not_come(corpora, tmp_path):
    folder = tmp_path / "run"
    one = job("pretrain", corpora / "tiny.yaml", f"output_dir={folder}", "stall_seconds=4")
    stacks = [folder / f"stacks_rank_{rank}.txt" for rank in range(2)]
    found = halted(tmp_path, one, "train.step Stepper._backward 1 4 wait", *stacks)
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]
    assert re.search(
        r"rank 1 \(.*, process \d+\) has been in a step for \d+ s after step 3 and did not enter "
        r"the collective that others wait in \(rank 0 in \w+\)",
        found,
    )
    assert "distributed_c10d.py" in (folder / "stacks_rank_0.txt").read_text()


@pytest.fixture(scope="module")
def trained(corpora, tmp_path_factory):
    """A run folder with a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    run_jobs(folder, [job("pretrain", corpora / "tiny.yaml", f"output_dir={folder}/run", "max_steps=1")], processes=1)
    return folder / "run"


# What is run, where it halts, and what is reported about that rank.
IN_TRAINING = ("finetune_retrieval", "scheduler.epochs=1", "stop_key=images", "splits=[images]")
WRITING = r"saving: writing rank_0000\d_of_00002.safetensors"
WRITTEN = r"evaluating images: (writing|confidence) .*"
ENCODING = r"evaluating images: visual 0 of 4 encoded"
slow = pytest.mark.slow
HALTS = {
    "saving, rank 1 stopped": (IN_TRAINING, "train.checkpoints.shards save_file 1 1 stop", WRITING),
    "saving, rank 0 stopped": (IN_TRAINING, "train.checkpoints.shards save_file 0 1 stop", WRITING),
    "saving, rank 0 flushes": (IN_TRAINING, "train.checkpoints.writing flush 0 1 wait", r"saving: .*"),
    "after an epoch, rank 1 stopped": (IN_TRAINING, "eval.features normalize 1 1 stop", ENCODING),
    "after an epoch, rank 0 reads": (IN_TRAINING, "loaders.evaluation VisualSet._batch 0 1 wait", ENCODING),
    "at the end, rank 1 waits": (IN_TRAINING, "eval.features normalize 1 2 wait", ENCODING),
    "alone, rank 1 stopped": (("evaluate", "splits=[images]"), "eval.features normalize 1 1 stop", ENCODING),
    "alone, rank 0 stopped": (("evaluate", "splits=[images]"), "eval.features normalize 0 1 stop", ENCODING),
    "alone, rank 1 reads": (("evaluate", "splits=[images]"), "loaders.evaluation VisualSet._batch 1 1 wait", ENCODING),
    "alone, rank 0 writes": (("evaluate", "splits=[images]"), "eval.outputs write_json 0 2 wait", WRITTEN),
}
QUICK = ("saving, rank 1 stopped", "alone, rank 0 stopped")


@pytest.mark.parametrize("case", [each if each in QUICK else pytest.param(each, marks=slow) for each in HALTS])
def test_a_halt_in_saving_or_evaluating_ends_the_job(corpora, trained, tmp_path, case):
    (entry, *settings), halt, report = HALTS[case]
    folder = tmp_path / "run"
    settings += [f"output_dir={folder}", "stall_seconds=5", f"checkpoint={trained}"]
    rank = halt.split()[-3]
    other = 1 - int(rank)
    stacks = (folder / "evaluation" if entry == "evaluate" else folder) / f"stacks_rank_{other}.txt"
    found = halted(tmp_path, job(entry, corpora / "tiny.yaml", *settings), halt, stacks)
    what = {"0stop": "did not answer rank 1", "1stop": "sent no heartbeat"}.get(rank + halt.split()[-1])
    assert re.search(rf"^rank {rank} \(.*{what or 'made no progress'}.* for \d+ s", found), found
    assert re.search(rf"last report: {report}[;:]", found + ";"), found
    assert re.search(rf"rank {other} in \w+", found), found
    remedy = "evaluate again" if entry == "evaluate" else "resume from the last checkpoint"
    assert found.endswith(f"Exiting; run the same command to {remedy}")
    assert "distributed_c10d.py" in stacks.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_saving_and_evaluating_that_continues_is_left_alone(corpora, tmp_path, rank):
    """One rank takes longer than `stall_seconds`, while the other one waits."""
    settings = (*IN_TRAINING[1:], f"output_dir={tmp_path}/run", "stall_seconds=5")
    places = {0: "train.checkpoints.writing flush", 1: "eval.features normalize"}
    halted(
        tmp_path, job("finetune_retrieval", corpora / "tiny.yaml", *settings), f"{places[rank]} {rank} 1 slow",
        until=r"(evaluation/final)", seconds=240,
    )  # fmt: skip
    assert "hangs" not in (tmp_path / "shown.txt").read_text()
