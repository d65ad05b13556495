"""`benchmarks/gpu_run.py`: comparison of the metrics that its runs log."""

import argparse
import json
import subprocess
import sys

import pytest

from benchmarks.gpu_run import TWINS, Commands, checked


@pytest.fixture
def commands(tmp_path):
    options = argparse.Namespace(
        output=tmp_path, steps=8, precision="bf16", corpus="photos", tokenizer="vocab.txt", batch=4, k_test=4
    )
    return Commands(options)


def log(commands, name, losses, **figures):
    folder = commands.output / name
    folder.mkdir()
    records = [{"step": step, "loss": loss, "grad_norm": 1.0, **figures} for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def ended(code):
    return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"])


@pytest.mark.parametrize(("last", "equal"), [(2.0, True), (2.0 + 2**-50, False)])
def test_twins_are_compared_bit_for_bit_except_for_times(commands, last, equal):
    for name, loss, rate in zip(TWINS, (2.0, last), (100.0, 90.0), strict=True):
        log(commands, name, [3.0, loss], samples_per_second=rate)
    assert commands.twins_are_equal([ended(0), ended(0)]) is equal


def test_twins_without_a_step_are_not_equal(commands):
    assert commands.twins_are_equal([ended(0), ended(0)]) is False


def test_a_failed_twin_is_reported_with_its_last_line(commands):
    (commands.output / f"{TWINS[1]}.log").write_text("words\nno deterministic kernel\n")
    assert commands.twins_are_equal([ended(0), ended(1)]) == f"{TWINS[1]}: exit code 1: no deterministic kernel"


def test_different_bits_are_not_a_fault():
    found = {"steps": [1, 2], "last_loss": 2.0, "whole_loss": 2.0, "deterministic_equal": False}
    assert checked(found, 2)["ok"]
