"""How training ends before its time: in good order, or for want of another rank."""

from __future__ import annotations

import signal


class Stopped(Exception):
    """Training has ended before its time, in good order. `signal` is the cause, `step` the checkpoint's."""

    def __init__(self, number: int, step: int) -> None:
        self.signal, self.step = number, step
        cause = "the launcher has gone" if number == signal.SIGHUP else signal.Signals(number).name
        super().__init__(f"stopped ({cause}) at step {step}, saved: the same command goes on from there")


class LostRankError(RuntimeError):
    """Another rank has gone, and this one's collective failed of it. The message names that rank."""
