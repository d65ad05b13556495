"""A run that is killed at random moments, its disk lost at some of them, ends like one that was never killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_run import VARYING, environment, metrics

from model.checkpoints.loading import load_weights

KILLS = 5  # in a row, of each of the runs below: 20 moments
WAIT = 600  # seconds
LAST = "step_00000024"


class Launcher:
    """Starts launches one after another in processes that can be killed."""

    def __init__(self, config, log):
        self._config, self._log = str(config), log
        words = [sys.executable, str(Path(__file__).with_name("kill_worker.py"))]
        self._worker = subprocess.Popen(
            words, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def start(self, *settings):
        """Start a launch; returns its process id."""
        job = {"config": self._config, "settings": list(map(str, settings)), "log": str(self._log)}
        self._worker.stdin.write(json.dumps(job) + "\n")
        return int(self._worker.stdout.readline())

    def wait(self):
        """The exit status of what was started."""
        return int(self._worker.stdout.readline())

    def close(self):
        """End the worker."""
        self._worker.stdin.close()
        self._worker.wait(60)
        self._worker.stdout.close()


def training_began(log, times):
    """Wait until the log tells for the nth time that training begins."""
    deadline = time.monotonic() + WAIT
    while log.read_text().count("Training: ") < times:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def wait(seconds, last):
    """Wait so long, or until the last checkpoint is there: the machine may be faster than it was for the whole run."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not last.exists():
        time.sleep(0.01)


def lines(folder):
    """What a run has logged, without what varies from run to run: its losses, and the metrics of its evaluations."""
    return [
        {key: value for key, value in line.items() if key not in VARYING and not key.startswith("loader/")}
        for line in metrics(folder)
    ]


def same_weights(one, other):
    first, second = load_weights(one).state, load_weights(other).state
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def settings_of(folder, copies):
    return (
        f"output_dir={folder}", f"checkpoint_url={copies}", "stop_key=images", "scheduler.epochs=3", "save_every=3",
        "gallery=0",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(corpora, tmp_path_factory):
    """A run that was never killed, and the seconds that it trained for."""
    folder = tmp_path_factory.mktemp("whole")
    log = folder / "out.txt"
    log.touch()
    launcher = Launcher(corpora / "tiny.yaml", log)
    launcher.start(*settings_of(folder / "run", f"file://{folder}/copies"))
    training_began(log, 1)
    started = time.monotonic()
    assert launcher.wait() == 0, log.read_text()
    launcher.close()
    return folder / "run", time.monotonic() - started


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("place", ["file", "s3"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(corpora, whole, request, tmp_path, seed, place):
    run, log = tmp_path / "run", tmp_path / "out.txt"
    log.touch()
    copies = f"file://{tmp_path}/copies" if place == "file" else request.getfixturevalue("s3").url("copies")
    settings = settings_of(run, copies)
    launcher = Launcher(corpora / "tiny.yaml", log)
    chance = random.Random(f"{seed} {place}")
    for number in range(1, KILLS + 1):
        process = launcher.start(*settings)
        training_began(log, number)
        seconds = chance.uniform(0, whole[1] / (KILLS + 1))
        wait(seconds, run / "checkpoints" / LAST)
        os.kill(process, signal.SIGKILL)
        assert launcher.wait() == -signal.SIGKILL, log.read_text()
        steps = sorted(path.name for path in (run / "checkpoints").glob("[bs]*_*"))
        wiped = chance.random() < 0.5
        sys.stdout.write(f"{place}, seed {seed}: killed after {seconds:.2f} s; there: {steps}; disk lost: {wiped}\n")
        if wiped:
            shutil.rmtree(run)
    launcher.start(*settings)
    assert launcher.wait() == 0, log.read_text()
    launcher.close()
    assert lines(run) == lines(whole[0])
    assert same_weights(run / "checkpoints/best", whole[0] / "checkpoints/best")
    assert same_weights(run, whole[0])
    assert same_weights(run / "checkpoints" / LAST, whole[0] / "checkpoints" / LAST)
    results = (folder / "evaluation/final/metrics.json" for folder in (run, whole[0]))
    first, second = (json.loads(path.read_text()) for path in results)
    assert first == second
    assert json.loads((run / "finished.json").read_text()) == json.loads((whole[0] / "finished.json").read_text())
