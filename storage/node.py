"""This machine among those of a job: when it begins to read from stores, and how much each of its processes may."""

from __future__ import annotations

import logging
import os
import random
import time
from dataclasses import dataclass, replace

from loaders.config import RemoteReads

log = logging.getLogger("loaders")

WAITED: list[float] = []  # seconds that this process has waited for its node's turn; once is enough


@dataclass(frozen=True)
class Node:
    """Which of how many nodes this is, how many of the job's processes it has, and which of all is this one."""

    number: int = 0
    nodes: int = 1
    processes: int = 1
    rank: int = 0
    world_size: int = 1

    @property
    def start(self) -> float:
        """Where in a list of things that all processes need this one begins, in [0, 1): others begin elsewhere."""
        return self.rank / self.world_size


def node_of(rank: int, world_size: int, ranks_here: int | None = None) -> Node:
    """The node of a rank, where each has `ranks_here` of them in a row; without it there is one node."""
    here = ranks_here or world_size
    return Node(rank // here, -(-world_size // here), here, rank, world_size)


def this_node() -> Node:
    """The node of this process, as its launcher's variables tell; a plain `python` is a job of one."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    rank, world_size, here = (int(os.environ.get(name) or 0) for name in names)
    return node_of(rank, max(1, world_size), here or int(os.environ.get("LOCAL_SIZE") or 0))


def processes_here(world_size: int) -> int:
    """How many of a job's `world_size` processes are on this machine: all of them where no launcher says otherwise."""
    node = this_node()
    return node.processes if node.world_size == world_size else world_size


def share_of(settings: RemoteReads, node: Node) -> RemoteReads:
    """What one process of the node may ask of the stores: an equal part."""
    connections = max(1, settings.connections // node.processes)
    return replace(settings, connections=connections, requests_per_second=settings.requests_per_second / node.processes)


def wait_for_turn(node: Node, starts_per_second: float) -> None:
    """Return when it is this node's turn to read for the first time: many that start together begin one by one."""
    if WAITED or node.nodes < 2 or not starts_per_second:
        return
    WAITED.append((node.number + random.random()) / starts_per_second)
    if WAITED[0] > 1:
        log.info("node %d of %d reads from %.1f s on (remote.starts_per_second)", node.number, node.nodes, WAITED[0])
    time.sleep(WAITED[0])
