"""Starts launches in processes of their own by forking, which imports PyTorch and DeepSpeed only once.

Started by test_kills.py. Reads a job a line, {"config": PATH, "settings": [...], "log": PATH}; prints the process id of
each, then its exit status. The launches are real ones, in a process that the test may kill.
"""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.command import end, set_up_logging
from runtime.ranks import ranks_from_environment
from train.config.settings import load_settings
from train.job.interrupted import TrainingInterrupted

for name in ("launch.pretrain", "launch.training", "deepspeed", "s3fs"):
    importlib.import_module(name)


def launch(job):
    """What the entry point does, in this process."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    ranks = ranks_from_environment()
    set_up_logging(ranks)
    try:
        importlib.import_module("launch.pretrain").main(load_settings(job["config"], job["settings"]), ranks)
    except TrainingInterrupted:
        end(143)
    except BaseException:
        import traceback

        traceback.print_exc()
        end(1)
    end(0)


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        launch(json.loads(line))
    sys.stdout.write(f"{child}\n")
    sys.stdout.flush()
    sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
    sys.stdout.flush()
