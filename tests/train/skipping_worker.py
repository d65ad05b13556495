"""Two ranks of which one leaves out a collective at step 4 and waits in another one, under the run's own watchdog.

Started by test_watchdog.py with the folder of the run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import distributed

from launch.command import set_up_logging
from runtime.ranks import ranks_from_environment
from train.job.watchdog import LOADER, STEP, Watchdog


def main():
    ranks = ranks_from_environment()
    set_up_logging(ranks)
    distributed.init_process_group("gloo")
    gradients, others = distributed.group.WORLD, distributed.new_group()
    watchdog = Watchdog(ranks, limit=3, folder=Path(sys.argv[1]))
    for step in range(1, 100):
        watchdog.enter(LOADER, step - 1)
        watchdog.enter(STEP, step - 1)
        distributed.all_reduce(torch.ones(1), group=others if (ranks.rank, step) == (1, 4) else gradients)


if __name__ == "__main__":
    main()
