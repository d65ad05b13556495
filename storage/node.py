"""When a node begins to read from stores, and how much each of its processes may ask of them."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import replace

from loaders.config import RemoteReads
from runtime.ranks import Ranks

log = logging.getLogger("loaders")

WAITED: list[float] = []  # seconds that this process has waited for its node's turn; once is enough


def share_of(settings: RemoteReads, ranks: Ranks) -> RemoteReads:
    """What one process of the node may ask of the stores: an equal part."""
    connections = max(1, settings.connections // ranks.local_world_size)
    return replace(
        settings, connections=connections, requests_per_second=settings.requests_per_second / ranks.local_world_size
    )


def wait_for_turn(ranks: Ranks, starts_per_second: float) -> None:
    """Return when it is this node's turn to read for the first time: many that start together begin one by one."""
    if WAITED or ranks.num_nodes < 2 or not starts_per_second:
        return
    WAITED.append((ranks.node_rank + random.random()) / starts_per_second)
    if WAITED[0] > 1:
        log.info(
            "node %d of %d reads from %.1f s on (remote.starts_per_second)", ranks.node_rank, ranks.num_nodes, WAITED[0]
        )
    time.sleep(WAITED[0])
