"""Limits of how much a node and its processes use a store: concurrent requests, request rate, staggered starts."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from dataclasses import dataclass, replace

from runtime.ranks import Ranks
from runtime.settings import setting

BURST = 0.05  # seconds whose requests are sent at once: a timer per request costs more than the request

log = logging.getLogger(__name__)

_waited: list[float] = []  # seconds that this process has waited; it waits once


@dataclass
class RemoteReads:
    """Settings of reads from S3, GCS and web servers. They do not change the content of batches."""

    connections: int = setting(128, "concurrent requests of a node, shared equally by its processes", least=1)
    requests_per_second: float = setting(3000.0, "requests per second of a node, likewise; 0: no limit", least=0)
    starts_per_second: float = setting(20.0, "nodes of a job that start to read each second; 0: all at once", least=0)
    gap_kb: int = setting(64, "maximum kilobytes between frames that one request reads", least=0)
    ahead_mb: int = setting(256, "maximum megabytes read ahead of decoding", least=1)
    ahead_steps: int = setting(8, "maximum steps read ahead of decoding", least=1)
    deadline: float = setting(120.0, "seconds for one byte range, all tries together", above=0)
    try_seconds: float = setting(30.0, "seconds for one try", above=0)
    hedge_percentile: float = setting(
        0.95, "a request slower than this share of others is sent again; 0: never", least=0, below=1
    )


def share_of(settings: RemoteReads, ranks: Ranks) -> RemoteReads:
    """The equal share of the limits for one process of the node."""
    return replace(
        settings,
        connections=max(1, settings.connections // ranks.local_world_size),
        requests_per_second=settings.requests_per_second / ranks.local_world_size,
    )


def wait_for_turn(ranks: Ranks, starts_per_second: float) -> None:
    """Wait before this process' first read, so that the nodes of a job do not all begin at once."""
    if _waited or ranks.num_nodes < 2 or not starts_per_second:
        return
    seconds = (ranks.node_rank + random.random()) / starts_per_second
    _waited.append(seconds)
    if seconds > 1:
        starts = "node %d of %d starts to read in %.1f s (remote.starts_per_second)"
        log.info(starts, ranks.node_rank, ranks.num_nodes, seconds)
    time.sleep(seconds)


class RateLimiter:
    """Entered for each request (`async with`); belongs to the event loop that enters it first."""

    def __init__(self, connections: int, per_second: float) -> None:
        """per_second: 0 for no limit."""
        self._slots = asyncio.Semaphore(connections)
        self._interval = 1 / per_second if per_second else 0.0
        self._next = 0.0  # when the next request may be sent

    def is_free(self) -> bool:
        """Whether one more request would be sent at once."""
        return not self._slots.locked() and self._next <= asyncio.get_running_loop().time()

    async def __aenter__(self) -> None:
        """Wait for a slot, and for the request rate."""
        await self._slots.acquire()
        if not self._interval:
            return
        now = asyncio.get_running_loop().time()
        start = max(now - BURST, self._next)
        self._next = start + self._interval
        if start > now:
            try:
                await asyncio.sleep(start - now)
            except BaseException:
                self._slots.release()
                raise

    async def __aexit__(self, *error: object) -> None:
        """Free the slot."""
        self._slots.release()


_limiters: dict[tuple[int, int, float], RateLimiter] = {}  # by process: after a fork a child has its own


def rate_limiter(connections: int, per_second: float) -> RateLimiter:
    """The one rate limiter of this process with these bounds, for all its corpora together."""
    return _limiters.setdefault((os.getpid(), connections, per_second), RateLimiter(connections, per_second))
