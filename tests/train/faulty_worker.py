"""Launches in which one rank fails or halts within a function; FAULT says where and how.

FAULT: "MODULE CLASS.FUNCTION RANK CALL HOW"; CALL is the number of the call, from 1. HOW: `stop` as SIGSTOP does,
`wait` forever, `slow` continues after SLOW seconds of reported progress; `bug`, `user`, `disk` raise such an error.
Started with the arguments of job_worker.py, or in place of launch/pretrain.py with its arguments.
"""

import errno
import importlib
import itertools
import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.command import run
from runtime.activity import progress
from runtime.errors import UserError

SLOW = 12.0


def fail(how):
    if how == "bug":
        raise ValueError("a bug in the model")
    if how == "user":
        raise UserError("this rank's disk is missing: mount it")
    if how == "disk":
        raise OSError(errno.ENOSPC, "No space left on device", "/data/part")
    if how == "stop":
        time.sleep(3)  # in which its last report reaches the other ranks
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "wait":
        threading.Event().wait()
    for part in range(int(SLOW * 2)):
        progress(f"slow part {part}")
        time.sleep(0.5)


def install():
    module, path, rank, call, how = os.environ["FAULT"].split()
    *outer, name = path.split(".")
    owner = importlib.import_module(module)
    for each in outer:
        owner = getattr(owner, each)
    original, calls = getattr(owner, name), itertools.count(1)

    def faulty(*arguments, **settings):
        if os.environ.get("RANK", "0") == rank and next(calls) == int(call):
            fail(how)
        return original(*arguments, **settings)

    setattr(owner, name, faulty)


def pretrain(settings, ranks):
    from launch.pretrain import main

    install()
    main(settings, ranks)


if __name__ == "__main__":
    if sys.argv[1].endswith(".json"):
        import job_worker

        install()
        job_worker.main(Path(sys.argv[1]))
    run("pretrain.py", "pre-training that fails", pretrain)
