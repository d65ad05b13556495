"""The doctor finds real faults of a cluster and names the host."""

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def job(hosts, corpora, tmp_path_factory):
    """A folder with hostfile, .deepspeed_env and a configuration whose corpora lie in the store."""
    work = tmp_path_factory.mktemp("job")
    (work / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    passed = {key: value for key, value in hosts.environment.items() if key.startswith(("AWS_", "OMP_", "DS_"))}
    (work / ".deepspeed_env").write_text("".join(f"{key}={value}\n" for key, value in passed.items()))
    text = (corpora / "tiny.yaml").read_text()
    for name in ("images_train", "clips_train"):
        hosts.fill(corpora / name, f"s3://doctor/{name}")
        text = text.replace(f'"{corpora}/{name}"', f"s3://doctor/{name}")
    (work / "job.yaml").write_text(text)
    return work


def doctor(hosts, job, *words, config=True):
    """Its findings, as (check, where, verdict, found), its exit code and the advice given."""
    words = [*words, *(["job.yaml", f"output_dir={job}/run"] if config else [])]
    command = [sys.executable, "-m", "launch.doctor", "--hostfile", "hostfile", "--json", "--seconds", "0.5", *words]
    result = hosts.run("node1", *command, cwd=job, check=False)
    assert result.returncode in (0, 1), result.stderr
    found = json.loads(result.stdout)
    assert all(finding["advice"] for finding in found if finding["verdict"] == "BAD")
    return found, result.returncode


def bad(found):
    return {(finding["check"], finding["where"]): finding["found"] for finding in found if finding["verdict"] == "BAD"}


@pytest.fixture
def restored(hosts):
    """Restores node2 after a test."""
    yield
    hosts.kill("node2")
    hosts.start("node2")


def test_a_sound_cluster_passes_with_an_estimate(hosts, job):
    found, code = doctor(hosts, job, "--least-gbit", "0.001", "--trial-steps", "5")
    assert bad(found) == {}
    assert code == 0
    by_check = {finding["check"]: finding["found"] for finding in found}
    checks = {"reach", "versions", "code", "hardware", "GPU", "clock", "ports", "link", "all-reduce", "output_dir"}
    assert by_check.keys() == checks | {"ssh", "decoding", "storage", "shards", "loading", "epoch"}
    assert "over gloo" in by_check["all-reduce"]
    epochs = {finding["where"]: finding["found"] for finding in found if finding["check"] == "epoch"}
    assert epochs.keys() == {"loading", "training, 5 steps"}
    assert all("an epoch of 52 in" in text for text in epochs.values())
    assert not list((job / "run").glob(".doctor*"))


def test_a_host_that_differs_and_cannot_reach_the_store_or_be_reached(hosts, job, corpora, tmp_path, restored):
    metadata = next(Path(str(f.locate())) for f in importlib.metadata.files("timm") if f.name == "METADATA")
    other_version, other_code = tmp_path / "METADATA", tmp_path / "code.py"
    own = importlib.metadata.version("timm")
    other_version.write_text(metadata.read_text().replace(f"Version: {own}", "Version: 0.0.9", 1))
    code = hosts.root / "launch/pretrain.py"
    other_code.write_text(code.read_text() + "\n# of last week\n")
    hosts.run("node2", "mount", "--bind", other_version, metadata)
    hosts.run("node2", "mount", "--bind", other_code, code)
    hosts.run("node2", "sh", "-c", f"mkdir -p {job}/run && mount -t tmpfs tmpfs {job}/run")
    hosts.firewall("node2", "table inet f { chain in { type filter hook input priority 0; tcp dport 29500 drop; }; "
        "chain out { type filter hook output priority 0; tcp dport 5000 drop; }; }")  # fmt: skip
    index = next((corpora / "images_train").glob("*.parquet")).name
    removal = f"import fsspec; fsspec.filesystem('s3').rm('doctor/images_train/{index}')"
    hosts.run("store", sys.executable, "-c", removal)
    found, code = doctor(hosts, job)
    hosts.fill(corpora / "images_train", "s3://doctor/images_train")
    reported = bad(found)
    assert code == 1
    assert reported["versions", "node2"] == f"timm 0.0.9; others timm {own}"
    assert reported.keys() >= {("code", "node2"), ("ports", "node1 -> node2")}
    assert reported["ports", "node1 -> node2"] == "port 29500: no response"
    assert reported["output_dir", "node2"] == "cannot see the file that the first host wrote"
    assert "was not read within" in reported["storage", "node2: s3://doctor/clips_train"]
    assert reported["shards", "s3://doctor/images_train"] == f"1 files are missing: {index}"
    assert ("storage", "node1: s3://doctor/clips_train") not in reported
    assert ("ports", "node2 -> node1") not in reported
    assert not any(where == "node1" for _, where in reported)


def test_a_slow_link_and_a_host_that_is_down(hosts, job, restored):
    hosts.shape("node2", "tbf", "rate", "8mbit", "burst", "32kbit", "latency", "400ms")
    found, code = doctor(hosts, job, "--least-gbit", "0.05", config=False)
    assert code == 1
    links = {where: text for (check, where), text in bad(found).items() if check == "link"}
    assert links.keys() == {"node1 -> node2", "node2 -> node1"}
    assert all(float(text.split()[0]) < 0.01 for text in links.values())
    hosts.cut("node2")
    found, code = doctor(hosts, job, config=False)
    assert code == 1
    assert "node2" in bad(found)["reach", "node2"]
