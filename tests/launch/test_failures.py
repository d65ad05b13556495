"""A failure of any rank is shown on the console once and in that rank's log; a port in use is not a failure."""

import os
import pty
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import ROOT, environment, metrics

from runtime import rendezvous
from runtime.errors import UserError
from runtime.ranks import Ranks

pytestmark = pytest.mark.timeout(400)

BIN = Path(sys.executable).parent
FAULTY = Path(__file__).parents[1] / "train/faulty_worker.py"
LAUNCHERS = {
    "deepspeed": [BIN / "deepspeed", "--num_accelerators", "2"],
    "torchrun": [BIN / "torchrun", "--nproc_per_node", "2"],
    "python": [sys.executable],
}
STEP, LOADING = "train.step Stepper._backward", "train.prepare share_cores"


def failed(launcher, corpora, folder, fail):
    """The exit code and the output of a run that fails as FAULT says, under a launcher."""
    words = [*map(str, LAUNCHERS[launcher]), str(FAULTY), str(corpora / "tiny.yaml"), f"output_dir={folder}"]
    variables = {**environment(), "FAULT": fail}
    result = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=300)
    return result.returncode, result.stdout + result.stderr


@pytest.fixture
def usual_port():
    """Has the port that launchers choose by default in use, as another job of this machine does."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", 29500))
            listener.listen()
        except OSError:  # it is anyway
            pass
        yield


@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_bug_on_one_rank_shows_its_traceback_once(corpora, tmp_path, usual_port, launcher):
    code, shown = failed(launcher, corpora, tmp_path / "run", f"{STEP} 1 1 bug")
    assert code == 1, shown
    assert shown.count("ValueError: a bug in the model") == 1, shown
    assert "rank 1: Traceback (most recent call last):" in shown
    assert "faulty_worker.py" in shown
    kept = (tmp_path / "run/logs/rank_00001.txt").read_text()
    assert "ValueError: a bug in the model" in kept
    assert "Building the model" in kept  # from before there was a folder
    assert "ValueError" not in (tmp_path / "run/log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_what_a_user_can_mend_on_one_rank_is_one_line(corpora, tmp_path, launcher):
    code, shown = failed(launcher, corpora, tmp_path / "run", f"{LOADING} 1 1 user")
    assert code != 0
    assert shown.count("error: rank 1: this rank's disk is missing: mount it\n") == 1, shown
    assert "UserError" not in shown
    assert "UserError" in (tmp_path / "run/logs/rank_00001.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "code", "reported"),
    [
        ("bug", 1, "ValueError: a bug in the model"),
        ("user", 2, "error: this rank's disk is missing: mount it"),
        ("disk", 2, "error: No space left on device: '/data/part'"),
    ],
)
def test_a_single_process_reports_its_failures(corpora, tmp_path, kind, code, reported):
    found, shown = failed("python", corpora, tmp_path / "run", f"{LOADING} 0 1 {kind}")
    assert found == code, shown
    assert shown.strip().splitlines()[-1].startswith(reported)
    assert ("Traceback" in shown) == (kind == "bug")
    assert re.match(r"\[\d\d:\d\d:\d\d\] launch/pretrain.py \S+tiny.yaml, 1 process: loading PyTorch", shown)


def on_one_node(monkeypatch, **variables):
    monkeypatch.setattr(rendezvous, "_agreed", [])
    monkeypatch.setattr(rendezvous, "_servers", [])
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    given = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "CROSS_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**given, "MASTER_PORT": "29500", **variables}.items():
        monkeypatch.setenv(name, value)


def test_a_node_chooses_a_free_port_and_the_others_learn_it(monkeypatch, usual_port):
    on_one_node(monkeypatch)
    note = rendezvous._port_file()
    left = note.with_name(f"{note.name.rsplit('-', 2)[0]}-{2**22 + 1}-7")  # no process has such a number
    left.write_text("29500")
    port = rendezvous.master_port(Ranks(0, 2, 0, 2), 10)
    assert not left.exists()
    assert port != 29500
    assert os.environ["MASTER_PORT"] == str(port)
    kept = rendezvous._servers
    on_one_node(monkeypatch)  # the other process
    assert rendezvous.master_port(Ranks(1, 2, 1, 2), 10) == port
    rendezvous.connect(Ranks(1, 2, 1, 2), 10).set("key", "value")
    assert kept[0].get("key") == b"value"
    rendezvous.remove_port_file()
    on_one_node(monkeypatch)
    with pytest.raises(RuntimeError, match="rank 0 did not write its port"):
        rendezvous.master_port(Ranks(1, 2, 1, 2), 0.3)


def test_several_nodes_are_shown_how_to_choose_another_port(monkeypatch, usual_port):
    on_one_node(monkeypatch, WORLD_SIZE="4", CROSS_SIZE="2")
    with pytest.raises(UserError, match=r"port 29500, .* in use on this host.*`deepspeed --master_port 29501"):
        rendezvous.master_port(Ranks(0, 4, 0, 2), 10)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_says_at_once_what_will_happen(corpora, tmp_path):
    folder, shown = tmp_path / "run", b""
    words = [*LAUNCHERS["deepspeed"], ROOT / "launch/pretrain.py", corpora / "tiny.yaml", f"output_dir={folder}"]
    child, terminal = pty.fork()
    if child == 0:
        os.execve(words[0], [*map(str, words), "scheduler.epochs=400", "save_every=100000"], environment())
    interrupted = False
    while b"stopped (SIGINT) at step" not in shown:
        shown += os.read(terminal, 65536)
        if not interrupted and any(line["step"] >= 3 for line in metrics(folder)):
            os.write(terminal, b"\x03")
            interrupted = True
    text = shown.decode()
    print(text)
    assert "SIGINT: saving after the current step, then exiting. `deepspeed` itself shows a traceback" in text
    assert text.index("SIGINT: saving") < text.index("Saved ") < text.index("stopped (SIGINT)")
    assert len(list((folder / "checkpoints").glob("step_*"))) == 1
    os.waitpid(child, 0)
    time.sleep(0.1)
