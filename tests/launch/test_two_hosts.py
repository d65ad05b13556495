"""Two hosts with addresses of their own train from an S3 server; one of them may be lost."""

import json
import re
import signal
from collections import Counter

import pytest
from object_stores import until
from small_run import learned, metrics

pytestmark = pytest.mark.timeout(600)

STEPS = 8  # of an epoch
WITNESS = "tests/launch/witness.py"
PASSED = ("AWS_", "OMP_", "DS_", "HF_", "TOKENIZERS_", "WITNESS")  # what DeepSpeed would not take to the other host
ALIVE = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=2 -o ServerAliveCountMax=3"}  # as docs/launching.md has it


@pytest.fixture(scope="module")
def recipe(hosts, corpora):
    """tiny.yaml with its corpora in the store's bucket."""
    text = (corpora / "tiny.yaml").read_text()
    for name in ("images_train", "clips_train"):
        hosts.fill(corpora / name, f"s3://corpora/{name}")
        text = text.replace(f'"{corpora}/{name}"', f"s3://corpora/{name}")
    path = corpora / "remote.yaml"
    path.write_text(text)
    return path


@pytest.fixture(autouse=True)
def _as_before(hosts):
    """A test that has cut a cable leaves nothing behind for the next one."""
    yield
    for name in ("node1", "node2"):
        hosts.kill(name)
        hosts.start(name)


def launch(hosts, start_at, names, folder, *words, witness=None):
    """`deepspeed --hostfile` as a user types it on a host; its output goes to FOLDER.log."""
    work = folder.parent
    (work / "hostfile").write_text("".join(f"{name} slots=1\n" for name in names))
    settings = {**ALIVE, **({"WITNESS": str(witness)} if witness else {})}
    passed = {key: value for key, value in {**hosts.environment, **settings}.items() if key.startswith(PASSED)}
    (work / ".deepspeed_env").write_text("".join(f"{key}={value}\n" for key, value in passed.items()))
    script = hosts.root / (WITNESS if witness else "launch/pretrain.py")
    command = ["deepspeed", "--hostfile", work / "hostfile", script, *words, f"output_dir={folder}"]
    return hosts.popen(start_at, *command, log=folder.with_suffix(".log"), cwd=work, **settings)


def samples(witness):
    """{step: [(kind, key) of all ranks]}."""
    found = {}
    for path in witness.parent.glob(f"{witness.name}.*"):
        for line in map(json.loads, path.read_text().splitlines()):
            found.setdefault(line["step"], []).extend((line["kind"], key) for key in line["keys"])
    return found


def test_two_hosts_learn_what_one_learns_with_two_processes(hosts, recipe, tmp_path):
    both, one = tmp_path / "both", tmp_path / "one"
    process = launch(hosts, "node1", ["node1", "node2"], both, recipe, "scheduler.epochs=1")
    assert process.wait() == 0, both.with_suffix(".log").read_text()
    words = ["deepspeed", "--num_accelerators", "2", "launch/pretrain.py", recipe, "scheduler.epochs=1"]
    hosts.run("node1", *words, f"output_dir={one}")
    assert [line["step"] for line in learned(both)] == list(range(1, STEPS + 1))
    assert learned(both) == learned(one)


def cut(hosts, name):
    hosts.cut(name)


def switch_off(hosts, name):
    hosts.kill(name)


@pytest.mark.parametrize(
    ("start_at", "lose", "lost", "sign"),
    [
        ("node1", cut, "node2", "sent no heartbeat"),
        pytest.param("store", cut, "node1", "did not answer", marks=pytest.mark.slow),
        pytest.param("store", switch_off, "node1", "is gone", marks=pytest.mark.slow),
    ],
)
def test_a_lost_host_ends_the_job_and_the_one_left_resumes(hosts, recipe, tmp_path, start_at, lose, lost, sign):
    left = "node1" if lost == "node2" else "node2"
    folder, log = tmp_path / "run", tmp_path / "run.log"
    settings = (recipe, "scheduler.epochs=400", "stall_seconds=6")
    first, second = tmp_path / "first", tmp_path / "second"
    process = launch(hosts, start_at, ["node1", "node2"], folder, *settings, witness=first)
    until(lambda: any(line["step"] >= 13 for line in metrics(folder)), log.read_text, process)
    lose(hosts, lost)
    assert process.wait(120) != 0  # stall_seconds, and some for ssh and DeepSpeed
    reported = log.read_text()
    assert re.search(rf"rank \d \({lost}\b.*{sign}", reported), reported
    assert "run the same command to resume from the last checkpoint" in reported
    for name in {"node1", "node2"} - ({lost} if lose is switch_off else set()):
        until(lambda name=name: not hosts.processes(name, "witness.py"), lambda: "processes are left")

    saved = max(int(path.name[5:]) for path in (folder / "checkpoints").glob("step_*"))
    end = ((saved - 1) // STEPS + 2) * STEPS  # of the next epoch
    process = launch(hosts, left, [left], folder, *settings, witness=second)
    until(lambda: any(line["step"] > end for line in metrics(folder)), log.read_text, process)
    for launcher in hosts.processes(left, "deepspeed --hostfile"):
        launcher.send_signal(signal.SIGTERM)
    until(lambda: not hosts.processes(left, "witness.py"), lambda: "processes are left")
    assert f"Resuming the run in {folder} from step {saved}" in log.read_text()

    before, after = samples(first), samples(second)
    assert min(after) == saved + 1
    for epoch in (end // STEPS - 2, end // STEPS - 1):
        steps = range(epoch * STEPS + 1, epoch * STEPS + STEPS + 1)
        seen = Counter(key for step in steps for key in (before if step <= saved else after)[step])
        assert Counter(kind for kind, _ in seen) == {"image": 40, "video": 12}
        assert set(seen.values()) == {1}


def ask_to_stop(hosts):
    """Ctrl-C, or SIGTERM to `deepspeed`, which takes it to the hosts."""
    (launcher,) = hosts.processes("store", "deepspeed --hostfile")
    launcher.send_signal(signal.SIGTERM)


def kill_the_way(hosts):
    """`deepspeed` and the connections to the hosts are gone at once, as when the login host is switched off."""
    for part in ("deepspeed", "pdsh"):
        for process in hosts.processes("store", part):
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [ask_to_stop, kill_the_way])
def test_stopped_from_a_login_host_all_hosts_save_and_end(hosts, recipe, tmp_path, stop):
    folder, log = tmp_path / "run", tmp_path / "run.log"
    settings = (recipe, "scheduler.epochs=400", "save_every=100000")
    process = launch(hosts, "store", ["node1", "node2"], folder, *settings)
    until(lambda: any(line["step"] >= 5 for line in metrics(folder)), log.read_text, process)
    stop(hosts)
    for name in ("node1", "node2"):
        until(lambda name=name: not hosts.processes(name, "pretrain.py"), log.read_text)
    (saved,) = (folder / "checkpoints").glob("step_*")
    assert int(saved.name[5:]) >= max(line["step"] for line in metrics(folder)) - 1


def test_gloo_gets_the_interface_that_leads_to_the_first_host(hosts):
    code = (
        "from runtime.network import interface_towards as way; "
        "print(way('{}'), way('127.0.0.1'), way('nowhere.invalid'))"
    )
    reported = hosts.run("node2", "python", "-c", code.format("node1")).stdout
    assert reported.split() == ["eth0"]
    assert hosts.run("node1", "python", "-c", code.format("10.203.77.11")).stdout.split() == ["eth0"]
