"""The loss scale of fp16, one view of it for every ZeRO stage: where DeepSpeed keeps it, and what it leaves to us."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class LossScale:
    """What the loss is multiplied by before the backward pass, so that small gradients do not vanish; 1 but in fp16.

    DeepSpeed divides the gradients by it, halves it when they overflow, and doubles it after 1000 good steps.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        optimizer: Any = engine.optimizer
        partitioned = engine.zero_optimization_stage() > 0
        self._scaler: Any = None
        if engine.fp16_enabled():
            self._scaler = optimizer.loss_scaler if partitioned else optimizer.loss_scale_config
            self._scaler.raise_error_at_min_scale = False  # train.guard ends such a run, and names the samples
        self._ours = self._scaler is not None and not partitioned

    @property
    def value(self) -> float:
        """The present scale."""
        return 1.0 if self._scaler is None else float(self._scaler.cur_scale)

    @property
    def can_fall(self) -> bool:
        """Whether an overflow now would say no more than that the scale is too large."""
        if self._scaler is None:
            return False
        settings = vars(self._scaler)  # their names differ between ZeRO and none
        dynamic = settings.get("dynamic", settings.get("dynamic_loss_scale"))
        return bool(dynamic) and self.value > settings.get("min_scale", settings.get("min_loss_scale"))

    def apply(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss () that `engine.backward` is to have: without ZeRO it does not scale it, though it unscales."""
        return loss * self.value if self._ours else loss

    def state(self) -> dict[str, float]:
        """What a checkpoint holds of it; empty but in fp16."""
        return (
            {}
            if self._scaler is None
            else {key: vars(self._scaler)[key] for key in _STATE if key in vars(self._scaler)}
        )

    def load(self, state: dict[str, float]) -> None:
        """Go back to what `state` gave, under this ZeRO stage or another; ignored but in fp16."""
        if self._scaler is not None:
            vars(self._scaler).update(state)
