"""What a process may ask of the stores, of all its corpora together: requests at a time, and a second."""

from __future__ import annotations

import asyncio
import os

BURST = 0.05  # seconds whose requests may be sent at once: a timer for each of them would cost more than the request


class Gate:
    """Entered for each request (`async with`); belongs to the event loop that enters it first."""

    def __init__(self, connections: int, per_second: float) -> None:
        """per_second: 0 for any number."""
        self._slots = asyncio.Semaphore(connections)
        self._gap = 1 / per_second if per_second else 0.0
        self._next = 0.0  # when the next request may be sent

    def is_free(self) -> bool:
        """Whether one more request would be sent at once."""
        return not self._slots.locked() and self._next <= asyncio.get_running_loop().time()

    async def __aenter__(self) -> None:
        """Wait for a slot, and for the time."""
        await self._slots.acquire()
        if not self._gap:
            return
        now = asyncio.get_running_loop().time()
        mine = max(now - BURST, self._next)
        self._next = mine + self._gap
        if mine > now:
            try:
                await asyncio.sleep(mine - now)
            except BaseException:
                self._slots.release()
                raise

    async def __aexit__(self, *error: object) -> None:
        """Let the next one in."""
        self._slots.release()


GATES: dict[tuple[int, int, float], Gate] = {}  # by process: a child has its own after a fork


def gate_of_process(connections: int, per_second: float) -> Gate:
    """The one gate of this process with these bounds."""
    return GATES.setdefault((os.getpid(), connections, per_second), Gate(connections, per_second))
