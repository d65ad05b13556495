"""A torch profiler's trace of some steps of a run, for chrome://tracing, Perfetto or TensorBoard."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger(__name__)


class StepProfiler:
    """Traces steps `first` to `last`, both included, of one rank into `folder`; without steps it does nothing."""

    def __init__(self, steps: list[int], folder: Path, rank: int, device: torch.device) -> None:
        """steps: empty, or [first, last]."""
        self._steps, self._path = steps, folder / f"steps_{'_'.join(map(str, steps))}_rank_{rank}.json"
        self._device = device
        self._profile: profile | None = None
        self._last = 0

    def before(self, step: int) -> None:
        """Begin where step number `step` = 1, 2, ... is the first one."""
        if self._steps and step == self._steps[0]:
            cuda = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._profile.start()

    def after(self, step: int) -> None:
        """Write the trace where step number `step` was the last one."""
        self._last = step
        if self._profile is not None and step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write the trace of a run that ends among the steps."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(self._path))
        except (OSError, RuntimeError) as error:  # a full disk; the run is worth more than its trace
            log.warning("Lost the trace of steps %d to %d: %s: %s", self._steps[0], self._last, self._path, error)
            return
        log.info("Trace of steps %d to %d: %s", self._steps[0], self._last, self._path)
