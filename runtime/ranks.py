"""Which process of the job this is, as `deepspeed`, `torchrun`, `srun` or a plain `python` has started it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from runtime.errors import UserError


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

    @property
    def on_one_host(self) -> bool:
        """Whether the whole job runs on this machine."""
        return self.ranks_here == self.world_size


ALONE = Ranks()  # a job of one process

# What the other launchers call RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. The first one that is there counts:
# `mpirun` within a Slurm job starts its processes below a step of `srun`.
OF_LAUNCHERS = {
    "Open MPI's mpirun": (
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}  # fmt: skip
OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def ranks_from_environment() -> Ranks:
    """Read the launcher's variables; other programs look for RANK and its like, which are set where they are missing.

    A plain `python` is a job of one. Raises ValueError when several processes do not know where they meet.
    """
    environment = os.environ
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        environment.update(zip(OWN, _of_launcher(environment) or ("0", "1", "0", "1")))
        if environment["WORLD_SIZE"] == "1":
            environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
        elif "MASTER_ADDR" not in environment:
            raise UserError(
                "MASTER_ADDR is not set: export the address of the first host to all processes, and MASTER_PORT"
            )
        environment.setdefault("MASTER_PORT", "29500")
    world_size = int(environment["WORLD_SIZE"])
    here = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or "0"
    return Ranks(
        rank=int(environment["RANK"]),
        world_size=world_size,
        local_rank=int(environment.get("LOCAL_RANK", "0")),
        ranks_here=int(here) or world_size,
    )


def _of_launcher(environment: Mapping[str, str]) -> tuple[str, str, str, str] | None:
    """Rank, world size, local rank and processes here, as MPI or Slurm tell them."""
    for names in OF_LAUNCHERS.values():
        if all(name in environment for name in names):
            rank, size, local_rank, here = (environment[name] for name in names)
            return rank, size, local_rank, _tasks_here(here, int(environment.get("SLURM_NODEID", "0")))
    return None


def _tasks_here(counts: str, node: int) -> str:
    """Tasks of a node in Slurm's list of them: `2(x3),1` are 2, 2, 2, 1."""
    if counts.isdigit():
        return counts
    expanded: list[str] = []
    for each in counts.split(","):
        count, _, times = each.rstrip(")").partition("(x")
        expanded += [count] * int(times or 1)
    return expanded[node]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
