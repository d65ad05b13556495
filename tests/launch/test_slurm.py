"""Jobs of a real Slurm with two nodes: started by sbatch, interrupted in every way it has, they lose no step."""

import os
import re
import subprocess

import pytest
from object_stores import until
from places import ROOT
from small_run import environment, learned, metrics

from sharding.build import build_corpus
from sharding.shapes import write_shapes

pytestmark = pytest.mark.timeout(600)

STEPS = 8  # of an epoch


@pytest.fixture
def submit(slurm, tmp_path, monkeypatch):
    """sbatch from the repository's folder, with a user's environment."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
        slurm.environment[name] = value

    def sbatch(script, *words, options=()):
        options = ["--output", tmp_path / "job-%j.log", "--export=ALL", *options]
        return slurm.submit(*options, ROOT / "launch/slurm" / script, *words, cwd=ROOT)

    return sbatch


def requeued(slurm, job):
    """The administrator, or a failed node."""
    slurm.run("scontrol", "requeue", job)
    return "SIGTERM"


def at_the_end_of_its_time(slurm, job):
    """What Slurm does by itself 300 s before (--signal=USR1@300)."""
    slurm.run("scancel", "--signal=USR1", job)
    return "SIGUSR1"


def preempted(slurm, job):
    """A job of the partition `high` takes both nodes."""
    slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true", cwd="/")
    return "SIGTERM"


@pytest.mark.parametrize(
    "interrupt",
    [requeued, *(pytest.param(each, marks=pytest.mark.slow) for each in (at_the_end_of_its_time, preempted))],
)
def test_an_interrupted_job_resumes_by_itself(slurm, submit, corpora, tmp_path, interrupt):
    folder, epochs = tmp_path / "run", 20
    settings = (corpora / "tiny.yaml", f"output_dir={folder}", f"scheduler.epochs={epochs}", "save_every=100000")
    job = submit("pretrain.sbatch", *settings, options=["--nodes=2"])
    log = tmp_path / f"job-{job}.log"

    def state():
        return (log.read_text() if log.exists() else "") + str(slurm.job(job)) + slurm.logs()

    until(lambda: any(line["step"] >= 13 for line in metrics(folder)), state)
    before = max(line["step"] for line in metrics(folder))
    signal = interrupt(slurm, job)
    until(lambda: "run the same command to resume" in log.read_text(), state)
    stopped = int(re.search(rf"stopped \({signal}\) at step (\d+), saved", log.read_text())[1])
    assert before <= stopped < epochs * STEPS

    until(lambda: slurm.job(job)["Restarts"] == "1", state)
    until(lambda: slurm.job(job)["JobState"] == "PENDING", state)
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now+5")  # by itself it gives its nodes two minutes
    until(lambda: slurm.job(job)["JobState"] == "COMPLETED", state)
    assert f"Resuming the run in {folder} from step {stopped}" in log.read_text()
    assert "2 processes" in log.read_text()
    assert [line["step"] for line in learned(folder)] == list(range(1, epochs * STEPS + 1))


@pytest.mark.slow
def test_a_cancelled_job_saves_and_stays_cancelled(slurm, submit, corpora, tmp_path):
    folder = tmp_path / "run"
    settings = (corpora / "tiny.yaml", f"output_dir={folder}", "scheduler.epochs=400", "save_every=100000")
    job = submit("pretrain.sbatch", *settings, options=["--nodes=2"])
    until(lambda: any(line["step"] >= 5 for line in metrics(folder)), slurm.logs)
    slurm.run("scancel", job)
    until(lambda: not slurm.run("squeue", "-h", "-j", job), slurm.logs)
    assert slurm.job(job)["JobState"] == "CANCELLED"
    assert "stopped (SIGTERM)" in (tmp_path / f"job-{job}.log").read_text()
    assert list((folder / "checkpoints").glob("step_*"))


def test_a_mistake_ends_the_job_at_once(slurm, submit, corpora, tmp_path):
    # The other node's process is still starting when Slurm ends it: that is not a preemption.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('SLURM_PROCID') == '1': time.sleep(60)\n"
    )
    slurm.environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), slurm.environment.get("PYTHONPATH", "")])
    job = submit("pretrain.sbatch", corpora / "tiny.yaml", "no_such_key=1", options=["--nodes=2"])
    until(lambda: slurm.job(job)["JobState"] == "FAILED", slurm.logs)
    assert slurm.job(job)["Restarts"] == "0"
    assert "no_such_key" in (tmp_path / f"job-{job}.log").read_text()


def test_an_array_packs_what_one_process_packs(slurm, submit, tmp_path):
    shapes = write_shapes(tmp_path / "shapes", images=900, clips=1, test_items=1, size=64, seed=1, workers=1)
    annotations, media, output = shapes / "images_train.json", shapes / "media", tmp_path / "packed"
    options = ["--array=1-2", "--cpus-per-task=1", "--mem-per-cpu=10M"]
    words = ["--annotations", annotations, "--media-root", media, "--media-type", "image", "--output", output]
    job = submit("build.sbatch", *words, "--name", "x", "--size", 64, "--shard-mb", 1, options=options)
    until(lambda: not slurm.run("squeue", "-h", "-j", job), slurm.logs)
    plain = tmp_path / "plain"
    build_corpus([str(annotations)], str(media), "image", str(plain), name="x", size=64, shard_mb=1, workers=1)
    packed, expected = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (output, plain))
    assert len(expected) > 5  # a description, and tars with their indices
    assert packed == expected, (tmp_path / f"job-{job}.log").read_text()


@pytest.mark.parametrize(("gpus", "expected"), [("4", ["--gpu-bind=none", "--ntasks=8"]), ("", ["--ntasks=2"])])
def test_processes_see_all_gpus_of_their_node(tmp_path, gpus, expected):
    """A cluster without GPUs has no such option to give; Slurm itself is not asked here."""
    for name, text in {"srun": 'printf "%s\\n" "$@" > srun.txt', "scontrol": "echo node1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"JOB_NODELIST": "node[1-2]", "JOB_ID": "1", "JOB_NUM_NODES": "2", "CPUS_ON_NODE": "8"}
    job = {f"SLURM_{name}": value for name, value in (job | ({"GPUS_ON_NODE": gpus} if gpus else {})).items()}
    path = f"{tmp_path}:{os.environ['PATH']}"
    outside = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    words = ["bash", ROOT / "launch/slurm/run.sh", "pretrain", "tiny.yaml"]
    subprocess.run(words, cwd=tmp_path, env={**outside, **job, "PATH": path}, check=True)
    state = (tmp_path / "srun.txt").read_text().splitlines()
    assert [word for word in state if word.startswith(("--gpu", "--ntasks="))] == expected
