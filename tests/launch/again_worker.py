"""Trains in one process, as a notebook does: refused twice, stopped by a signal, to the end. Writes what it saw."""

import json
import os
import signal
import sys
import threading
from pathlib import Path

from launch.pretrain import main
from runtime.ranks import Ranks
from train.config.settings import load_settings
from train.job.stopping import SIGNALS

config, run, *settings = sys.argv[1:]
refused = Path(run).with_name("refused.json")
refused.write_text('{"zero_optimization": {"stage": 9}}')
seen = []


def attempt(*more: str, stop: bool = False) -> None:
    if stop:  # once a step has been logged
        threading.Thread(target=send, daemon=True).start()
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        main(load_settings(config, [f"output_dir={run}", *settings, *more]), Ranks())
        outcome = "done"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    given_back = [signal.getsignal(number) for number in SIGNALS] == before
    threads = [each.name for each in threading.enumerate() if each.name.startswith(("watchdog", "launcher"))]
    seen.append({"outcome": outcome, "given_back": given_back, "threads": threads})


def send() -> None:
    metrics = Path(run) / "metrics.jsonl"
    while not metrics.is_file() or not metrics.read_text():
        threading.Event().wait(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


attempt(f"deepspeed={refused}")
attempt(f"pretrained_path={run}/nowhere")
attempt(stop=True)
attempt()
Path(run).with_name("seen.json").write_text(json.dumps(seen))
