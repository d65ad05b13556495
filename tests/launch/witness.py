"""Pre-training as launch/pretrain.py does it, which also notes the samples of every step that has been done.

Started by a launcher in place of launch/pretrain.py. A line of WITNESS.RANK a step: {"step", "epoch", "keys"}.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.command import run
from launch.pretrain import main
from train.step import Stepper

step_as_it_is = Stepper.__call__


def noted(self, batch, number):
    losses = step_as_it_is(self, batch, number)
    line = {"step": number + 1, "epoch": batch.epoch, "kind": batch.media_type, "keys": batch.keys}
    with open(f"{os.environ['WITNESS']}.{os.environ['RANK']}", "a") as file:
        file.write(json.dumps(line) + "\n")
    return losses


Stepper.__call__ = noted

if __name__ == "__main__":
    run("pretrain.py", "pre-training with a witness", main)
