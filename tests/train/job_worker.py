"""Runs several launches one after another in the same processes.

Called by `run_jobs` and `run` of small_run.py in forks of a process with all imports, or started by torchrun.
A job: {"entry": "pretrain", "config": PATH, "settings": ["key=value", ...]}.
"""

import faulthandler
import gc
import importlib
import json
import logging
import os
import runpy
import sys
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.command import set_up_logging
from runtime.ranks import ranks_from_environment
from train.config.settings import load_settings
from train.job.interrupted import TrainingInterrupted

PRELOADED = ["launch.training", "launch.evaluation", "deepspeed", "transformers.models.bert.modeling_bert"]
FROZEN_SECONDS = 50  # just before the watchdog of another rank ends a job whose process makes no heartbeat


def run_job(job, ranks):
    """The launch's own `main`; returns "" or what went wrong."""
    main = importlib.import_module(f"launch.{job['entry']}").main
    faulthandler.dump_traceback_later(FROZEN_SECONDS)  # also where a thread keeps the interpreter's lock
    try:
        main(load_settings(job["config"], job["settings"]), ranks)
    except TrainingInterrupted as stopped:
        return str(stopped)
    except Exception:
        return traceback.format_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
        for logger in map(
            logging.getLogger,
            ("launch", "train", "eval", "loaders", "model", "preprocessing", "sharding", "storage", "runtime"),
        ):
            for handler in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
                logger.removeHandler(handler)
        gc.collect()
    return ""


def main(path):
    """Run the jobs of a file; a failure, and that the first rank is done, stand in a file beside it."""
    ranks = ranks_from_environment()
    set_up_logging(ranks)
    failures = []
    for job in json.loads(path.read_text()):
        failures.append(run_job(job, ranks))
        if failures[-1]:  # the other ranks may be anywhere
            break
    if any(failures) or ranks.is_first:
        path.with_suffix(f".{ranks.rank}").write_text(json.dumps(failures))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if any(failures) else 0)


def forked(run, folder, variables, searched, stdout, stderr, *words):
    """`run(*words)` in a process of small_run.py: in a folder, with an environment, a sys.path and output in files."""
    os.chdir(folder)
    sys.path[:] = searched
    os.environ.clear()
    os.environ.update(variables)
    gc.freeze()  # each job collects garbage twice; what was imported is none
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))  # OpenMP has read its variable before
    for number, path in ((1, stdout), (2, stderr)):
        with path.open("a") as shown:
            os.dup2(shown.fileno(), number)
    run(*words)


def script(path, *arguments):
    """`python PATH ARGUMENTS`."""
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
