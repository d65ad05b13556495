"""Several machines: a Ray cluster that loses a node, and jobs that share an output, give the bytes of a plain build."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from needs import module
from packed import contents
from places import ROOT

from sharding.build import build_corpus
from sharding.shapes import write_shapes

QUICK_TO_NOTICE = {  # on a busy machine less is too little
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 5000,
}


def draw(folder: Path, images: int) -> Path:
    return write_shapes(folder, images=images, clips=1, test_items=1, size=64, seed=1, workers=2)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("engines") / "shapes", 640)


def arguments(drawn: Path, output: Path, **settings) -> list[str]:
    options = {"--annotations": drawn / "images_train.json", "--media-root": drawn / "media", "--media-type": "image"}
    options |= {"--output": output, "--name": "x", "--size": "32"} | settings
    return [str(word) for pair in options.items() for word in pair]


def build(drawn: Path, output: Path, **settings):
    options = {"name": "x", "size": 32, "workers": 1} | settings
    return build_corpus([str(drawn / "images_train.json")], str(drawn / "media"), "image", str(output), **options)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch):
    """A head that builds nothing and two nodes of two cores: separate raylets with their own worker processes."""
    Cluster = module("ray.cluster_utils", "ray").Cluster
    monkeypatch.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    head = {"num_cpus": 0, "_system_config": QUICK_TO_NOTICE, "object_store_memory": 10**8}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.nodes = [cluster.add_node(num_cpus=2, object_store_memory=10**8) for _ in range(2)]
    cluster.wait_for_nodes()
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


def kill_node_when_it_is_busy(cluster, output: Path, shards: int) -> None:
    """After some shards are there, kill a node at work: its raylet and every worker process under it."""
    raylet = psutil.Process(cluster.nodes[0].all_processes["raylet"][0].process.pid)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        family = [raylet, *raylet.children(recursive=True)]
        with suppress(psutil.NoSuchProcess):
            busy = any("build_on_node" in " ".join(process.cmdline()) for process in family)
            if busy and len(list(output.glob("*.parquet"))) >= shards:
                for process in family:
                    process.kill()
                return
    raise AssertionError("the node never had anything to do")


@pytest.mark.parametrize("images", [640, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_ray_cluster_that_loses_a_node_gives_the_same_bytes(cluster, tmp_path: Path, images: int) -> None:
    drawn = draw(tmp_path / "drawn", images)
    build(drawn, tmp_path / "plain")
    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_node_when_it_is_busy, cluster, tmp_path / "cut", shards=2)
        corpus = build(drawn, tmp_path / "cut", engine="ray")
        killing.result()
    assert corpus.samples == images
    assert contents(tmp_path / "cut") == contents(tmp_path / "plain")


def test_without_a_ray_cluster_there_is_one_line(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module("ray", "ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = [sys.executable, "-m", "sharding.build", *arguments(drawn, tmp_path / "out"), "--engine", "ray"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: --engine ray finds no cluster" in done.stderr
    assert "ray start --head" in done.stderr


def test_parts_give_together_what_one_build_gives(drawn: Path, tmp_path: Path) -> None:
    build(drawn, tmp_path / "plain")
    for part in (2, 3):
        build(drawn, tmp_path / "parts", part=f"{part}/3")
        assert not (tmp_path / "parts" / "corpus.json").exists()
    with pytest.raises(ValueError, match=r"4 of 10 shards are not complete .*run the parts that build them again"):
        build(drawn, tmp_path / "parts", finish=True)
    corpus = build(drawn, tmp_path / "parts", part="1/3")
    assert corpus.samples == 640
    assert contents(tmp_path / "parts") == contents(tmp_path / "plain")
    (tmp_path / "parts" / "corpus.json").unlink()
    assert build(drawn, tmp_path / "parts", finish=True) == corpus
    assert contents(tmp_path / "parts") == contents(tmp_path / "plain")
    assert not (tmp_path / "parts" / ".partial").exists()


def slurm(drawn: Path, output: Path, part: int, parts: int) -> subprocess.Popen:
    """The script as a job of an array, with what Slurm puts into its environment."""
    of_slurm = {"ARRAY_TASK_ID": part + 10, "ARRAY_TASK_MIN": 11, "ARRAY_TASK_COUNT": parts, "CPUS_PER_TASK": 1}
    environment = os.environ | {f"SLURM_{name}": str(value) for name, value in of_slurm.items()}
    words = ["bash", "launch/slurm/build.sbatch", *arguments(drawn, output)]
    return subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_jobs_of_an_array_run_side_by_side_and_the_last_one_describes_the_corpus(drawn: Path, tmp_path: Path) -> None:
    build(drawn, tmp_path / "plain")
    jobs = [slurm(drawn, tmp_path / "array", part, 3) for part in (1, 2, 3)]
    logs = [job.communicate(timeout=120)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], logs
    assert contents(tmp_path / "array") == contents(tmp_path / "plain")


def test_a_killed_part_goes_on_and_no_part_runs_twice(drawn: Path, tmp_path: Path) -> None:
    build(drawn, tmp_path / "plain")
    job = slurm(drawn, tmp_path / "array", 1, 2)
    while not list((tmp_path / "array").glob("*.tar")):
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another build is writing to part 1/2"):
        build(drawn, tmp_path / "array", part="1/2")
    with pytest.raises(ValueError, match="another build is writing to"):
        build(drawn, tmp_path / "array")
    job.kill()
    job.communicate()
    build(drawn, tmp_path / "array", part="2/2")
    build(drawn, tmp_path / "array", part="1/2")
    assert contents(tmp_path / "array") == contents(tmp_path / "plain")
    assert not (tmp_path / "array" / ".partial").exists()


@pytest.mark.parametrize("part", ["0/2", "3/2", "2", "a/b"])
def test_a_part_that_is_none_is_refused(drawn: Path, tmp_path: Path, part: str) -> None:
    with pytest.raises(ValueError, match="must be I/N"):
        build(drawn, tmp_path / "out", part=part)
