"""Ranks of this process and sizes of the job, from the variables of `deepspeed`, `torchrun`, `srun` or MPI."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from runtime.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """The ranks of this process in the job and on its node; nodes have equally many consecutive ranks."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process logs and writes files."""
        return self.rank == 0

    @property
    def node_rank(self) -> int:
        """Number of this node."""
        return self.rank // self.local_world_size

    @property
    def num_nodes(self) -> int:
        """Nodes of the job."""
        return -(-self.world_size // self.local_world_size)

    @property
    def offset(self) -> float:
        """This process' start in a list that all processes traverse, in [0, 1); other processes start elsewhere."""
        return self.rank / self.world_size


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
    """Read the launcher's variables, and set RANK and similar ones where they are missing: other libraries read them.

    A plain `python` is a job of one. Raises UserError where several processes have no MASTER_ADDR.
    """
    environment = os.environ
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        environment.update(zip(OWN, _of_launcher(environment) or ("0", "1", "0", "1")))
        if environment["WORLD_SIZE"] == "1":
            environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
        elif "MASTER_ADDR" not in environment:
            raise UserError(
                "MASTER_ADDR is not set: export it (the address of the first host) and MASTER_PORT in all processes"
            )
        environment.setdefault("MASTER_PORT", "29500")
    return current_ranks()


def started_by_launcher() -> bool:
    """Whether `deepspeed` or `torchrun`, or `srun` or MPI as one of several, has started this process.

    A shell of `srun --pty bash` is one task of Slurm, in which a job is started by hand.
    """
    size = (_of_launcher(os.environ) or ("0", "1"))[1]
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys() or int(size) > 1


def current_ranks() -> Ranks:
    """The ranks from RANK and similar variables; without them a job of one process. Changes nothing."""
    environment = os.environ
    world_size = int(environment.get("WORLD_SIZE") or 1)
    local_world_size = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or 0)
    return Ranks(
        rank=int(environment.get("RANK") or 0),
        world_size=world_size,
        local_rank=int(environment.get("LOCAL_RANK") or 0),
        local_world_size=local_world_size or world_size,
    )


def ranks_of(rank: int, world_size: int, local_world_size: int | None = None) -> Ranks:
    """The ranks of a process by its rank alone; without `local_world_size` the job has one node."""
    here = local_world_size or world_size
    return Ranks(rank, world_size, rank % here, here)


def processes_on_node(world_size: int) -> int:
    """Number of the job's `world_size` processes on this node: all of them unless a launcher sets another."""
    ranks = current_ranks()
    return ranks.local_world_size if ranks.world_size == world_size else world_size


def cores_per_process(local_world_size: int) -> int:
    """One process' share of the cores that it may run on."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, local_world_size))


def _of_launcher(environment: Mapping[str, str]) -> tuple[str, str, str, str] | None:
    """Rank, world size, local rank and local world size in the variables of MPI or Slurm."""
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
