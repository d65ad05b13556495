"""The same training under every launcher, and none of them leaves processes behind."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
import yaml
from needs import lacks, leave_out
from object_stores import free_port, until
from small_run import ROOT, environment, learned, metrics

from runtime.ranks import Ranks, ranks_from_environment

pytestmark = pytest.mark.timeout(600)

BIN = os.path.dirname(sys.executable)


def with_path():
    return {**environment(), "PATH": f"{BIN}:{os.environ['PATH']}"}


def finish(processes):
    for process in processes:
        reported, _ = process.communicate()
        assert process.returncode == 0, reported


def begin(words, **settings):
    pipe, both, variables = subprocess.PIPE, subprocess.STDOUT, {**with_path(), **settings}
    return subprocess.Popen(list(map(str, words)), env=variables, cwd=ROOT, stdout=pipe, stderr=both, text=True)


def pod(number, folder, corpora, port):
    """What a pod of the Kubernetes manifest runs, on this machine."""
    _, job = yaml.safe_load_all((ROOT / "launch/k8s/pretrain.yaml").read_text())
    container = job["spec"]["template"]["spec"]["containers"][0]
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert int(variables["NODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    variables |= {"NODES": "2", "GPUS": "1", "JOB_COMPLETION_INDEX": str(number)}
    variables |= {"MASTER": "127.0.0.1", "PORT": str(port), "SETTINGS": "scheduler.epochs=1"}
    variables |= {"CONFIG": str(corpora / "tiny.yaml"), "OUTPUT": str(folder)}
    return begin([*container["command"], *container["args"]], **variables)


def test_kubernetes_pods_and_mpi_train_the_same(corpora, tmp_path):
    pods, mpi = tmp_path / "pods", tmp_path / "mpi"
    port = free_port()
    finish([pod(number, pods, corpora, port) for number in range(2)])
    assert [line["step"] for line in learned(pods)] == list(range(1, 9))
    leave_out(lacks("mpirun"))
    words = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable, "launch/pretrain.py"]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    finish([begin([*words, corpora / "tiny.yaml", f"output_dir={mpi}", "scheduler.epochs=1"], **where)])
    assert learned(mpi) == learned(pods)


def test_torchrun_killed_alone_leaves_no_process_and_no_step_is_lost(corpora, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    words = [f"{BIN}/torchrun", "--nproc_per_node=2", f"--master_port={free_port()}", "launch/pretrain.py"]
    settings = [corpora / "tiny.yaml", f"output_dir={folder}", "scheduler.epochs=400", "save_every=100000"]
    with log.open("w") as output:
        launcher = subprocess.Popen(
            [*words, *map(str, settings)], env=with_path(), cwd=ROOT, stdout=output, stderr=output
        )
    until(lambda: any(line["step"] >= 5 for line in metrics(folder)), log.read_text, launcher)
    workers = psutil.Process(launcher.pid).children(recursive=True)
    assert len([worker for worker in workers if "launch/pretrain.py" in worker.cmdline()]) == 2
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    until(lambda: not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers), log.read_text)
    assert "stopped (the launcher is gone) at step" in log.read_text()
    (saved,) = (folder / "checkpoints").glob("step_*")
    assert int(saved.name[5:]) >= 5


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Ranks(0, 1, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, Ranks(3, 4, 1, 2)),
        (
            {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
             "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "MASTER_ADDR": "n1"},
            Ranks(5, 7, 1, 2),
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
             "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0",
             "SLURM_STEP_TASKS_PER_NODE": "1", "MASTER_ADDR": "n1"},
            Ranks(1, 2, 1, 2),
        ),
    ],
)  # fmt: skip
def test_every_launcher_says_which_process_this_is(monkeypatch, variables, expected):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "MASTER_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", {**os.environ, **variables})
    assert ranks_from_environment() == expected
    assert os.environ["RANK"] == str(expected.rank)


def test_processes_that_do_not_know_where_they_meet_are_reported(monkeypatch):
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    variables = {f"OMPI_COMM_WORLD_{name}": "2" for name in names}
    monkeypatch.setattr(os, "environ", variables)
    with pytest.raises(ValueError, match=r"MASTER_ADDR is not set: export it \(the address of the first host"):
        ranks_from_environment()
