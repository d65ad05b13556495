"""Pre-training as launch/pretrain.py does it, in which one rank fails.

Started by a launcher in place of launch/pretrain.py. FAIL: "RANK bug|user|disk MODULE CLASS.FUNCTION".
"""

import errno
import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.command import run
from runtime.errors import UserError


def main(settings, ranks):
    from launch.pretrain import main as pretrain

    rank, kind, module, path = os.environ["FAIL"].split()
    *outer, name = path.split(".")
    owner = importlib.import_module(module)
    for each in outer:
        owner = getattr(owner, each)

    def fail(*_, **__):
        if kind == "user":
            raise UserError("this rank's disk is missing: mount it")
        if kind == "disk":
            raise OSError(errno.ENOSPC, "No space left on device", "/data/part")
        raise ValueError("a bug in the model")

    if ranks.rank == int(rank):
        setattr(owner, name, fail)
    pretrain(settings, ranks)


if __name__ == "__main__":
    run("pretrain.py", "pre-training that fails", main)
