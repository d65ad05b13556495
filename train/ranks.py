"""Which process of the job this is, as `deepspeed`, `torchrun`, `srun` or a plain `python` has started it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """This process' number among all and on its machine, and how many there are of each."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    ranks_here: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process logs and writes files."""
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """Read the launcher's variables; a plain `python` is a job of one, and gets the variables it lacks."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    environment = os.environ
    world_size = int(environment["WORLD_SIZE"])
    here = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or "0"
    return Ranks(
        rank=int(environment["RANK"]),
        world_size=world_size,
        local_rank=int(environment.get("LOCAL_RANK", "0")),
        ranks_here=int(here) or world_size,
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
