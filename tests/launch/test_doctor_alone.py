"""The doctor on a single host: GPU or none, an all-reduce, a product, a picture; a crash ends only its own check."""

import json
import subprocess
import sys
from contextlib import closing

import pytest
import torch
from small_run import environment, free_port

from launch.doctor import all_reduce, examine, probe
from launch.doctor.__main__ import main
from launch.doctor.findings import OK
from launch.doctor.nodes import ROOT, start


def test_a_host_without_gpus_passes():
    words = [sys.executable, "-m", "launch.doctor", "--json", "--port", str(free_port())]
    result = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    reported = {finding["check"]: finding for finding in json.loads(result.stdout)}
    assert {finding["verdict"] for finding in reported.values()} == {OK}
    assert reported["GPU"]["found"] == "no GPU: the CPU computes and decodes"
    assert reported["all-reduce"]["where"] == "1 process"
    assert reported["all-reduce"]["found"] == "over gloo, sums and bf16 products are right"
    assert reported["decoding"]["found"].startswith("CPU, 0.")


def test_a_hostfile_without_hosts_is_reported(capsys):
    assert main(["--hostfile", "nowhere"]) == 2
    reported = "error: --hostfile nowhere has no hosts: write one per line, such as `node1 slots=8`\n"
    assert capsys.readouterr().err == reported


def test_the_processes_of_one_host_meet(monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    with closing(start("localhost", 2, "")) as node:
        (finding,) = examine.examine_network([node], free_port(), 1.0)
    assert finding.where == "2 processes"
    assert finding.found.endswith("Gbit/s of bus bandwidth over gloo, sums and bf16 products are right")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os; os.kill(os.getpid(), 11)", "decoding a picture ended with signal 11: no reason given"),
        ("raise ValueError('an intact image cannot be decoded')", "ValueError: an intact image cannot be decoded"),
        ("import time; time.sleep(60)", "decoding a picture did not end within 1 s"),
    ],
)
def test_a_decoder_that_crashes_or_hangs_harms_nothing_else(monkeypatch, tmp_path, program, reason):
    (tmp_path / "decode.py").write_text(program)
    monkeypatch.setattr(probe, "DECODE_ONE", tmp_path / "decode.py")
    monkeypatch.setattr(probe, "DECODE_SECONDS", 1.0)
    with pytest.raises(RuntimeError, match=reason):
        probe.Probe().decode_one()


def test_wrong_products_are_reported(monkeypatch):
    all_reduce.check_product(torch.device("cpu"))
    monkeypatch.setattr(all_reduce, "LARGEST_ERROR", 0.0)
    with pytest.raises(RuntimeError, match=r"cpu on \S+: bf16 matrix product deviates by \d"):
        all_reduce.check_product(torch.device("cpu"))
