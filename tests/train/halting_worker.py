"""As job_worker.py, but one rank comes to a halt within a function: stopped as by SIGSTOP, or waiting for ever.

HALT says where: "MODULE CLASS.FUNCTION RANK CALL stop|wait|slow"; CALL is the number of the call, from 1. `slow` goes
on after SLOW seconds in which progress is reported.
"""

import importlib
import itertools
import os
import signal
import threading
import time

import job_worker

from runtime.activity import progress

SLOW = 12.0


def halt(how):
    if how == "stop":
        time.sleep(3)  # in which its last report reaches the other ranks
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "wait":
        threading.Event().wait()
    for part in range(int(SLOW * 2)):
        progress(f"slow part {part}")
        time.sleep(0.5)


def main():
    module, path, rank, call, how = os.environ["HALT"].split()
    owner = importlib.import_module(module)
    *outer, name = path.split(".")
    for each in outer:
        owner = getattr(owner, each)
    original, calls = getattr(owner, name), itertools.count(1)

    def halting(*arguments, **settings):
        if int(os.environ["RANK"]) == int(rank) and next(calls) == int(call):
            halt(how)
        return original(*arguments, **settings)

    setattr(owner, name, halting)
    job_worker.main()


if __name__ == "__main__":
    main()
