"""The end of training by a signal."""

from __future__ import annotations

import signal


class TrainingInterrupted(Exception):
    """A signal asked to stop; `step` is that of the checkpoint written then."""

    def __init__(self, number: int, step: int) -> None:
        self.signal, self.step = number, step
        cause = "the launcher is gone" if number == signal.SIGHUP else signal.Signals(number).name
        super().__init__(f"stopped ({cause}) at step {step}, saved: run the same command to resume")
