"""The learning rate of every step, a pure function of the step's number: linear warm-up, then cosine decay."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi


@dataclass(frozen=True)
class Schedule:
    """Warm-up over `warmup_steps` (fractions count), cosine decay until `total_steps`, floored at `min_multiplier`."""

    warmup_steps: float
    total_steps: int
    min_multiplier: float

    def multiplier(self, step: int) -> float:
        """The factor of the base learning rates at optimiser step `step` = 0, 1, 2, ...

        Past the last step it stays at `min_multiplier`.
        """
        if step < self.warmup_steps:
            return max(self.min_multiplier, step / max(1.0, self.warmup_steps))
        if step >= self.total_steps:
            return self.min_multiplier
        progress = (step - self.warmup_steps) / max(1.0, self.total_steps - self.warmup_steps)
        return max(self.min_multiplier, 0.5 * (1.0 + cos(pi * progress)))
