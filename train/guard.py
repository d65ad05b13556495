"""Clips gradients and skips steps whose gradient is not finite, which it logs with their samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from runtime.collectives import gather_objects
from runtime.errors import UserError
from runtime.ranks import Ranks
from train.deepspeed.compat import LossScale, averaged_gradients, present_gradient_norm
from train.deepspeed.state import base_optimizer

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Step:
    """A step not yet inspected: its tensors are still on the device."""

    step: int
    keys: tuple[str, ...]
    loss: torch.Tensor
    skipped: torch.Tensor | bool
    scale_could_fall: bool  # of fp16


def gradient_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """L2 norm () float32 of a gradient sharded over all ranks; all ranks call; no synchronization with the host."""
    norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32))
    squared = norms.square().sum()
    if distributed.get_world_size() > 1:
        distributed.all_reduce(squared)
    return squared.sqrt()


class StepGuard:
    """Clips gradients, and makes AdamW skip steps with infinities or NaN in the gradient, on all ranks alike.

    Where DeepSpeed does not test the gradient itself (bf16 and fp32 under ZeRO 1 and 2, fp32 without ZeRO), AdamW's
    kernel skips by a flag on the device, so that no step waits for it. `inspect` waits, and logs the skipped steps.
    """

    def __init__(self, engine: DeepSpeedEngine, ranks: Ranks, limit: int, max_grad_norm: float = 0.0) -> None:
        """limit: skipped steps in a row that end the run. max_grad_norm: to clip to; 0 or less: not at all."""
        self.skipped = 0  # since the start of this process
        self.norm: torch.Tensor | float | None = None  # of the last step's gradient, before clipping
        self._max_grad_norm = max_grad_norm
        self._partitioned = engine.zero_optimization_stage() > 0
        self._measures = self._partitioned and not engine.zero_compute_grad_norm()
        self._engine, self._ranks, self._limit = engine, ranks, limit
        self.loss_scale = LossScale(engine)
        self._scale_can_fall = self.loss_scale.can_fall
        self._pending: list[_Step] = []
        self._bad: torch.Tensor | None = None
        self._measured: torch.Tensor | None = None
        self._row = 0
        base = base_optimizer(engine)
        if isinstance(base, torch.optim.AdamW):
            base.register_step_pre_hook(self._before_update)

    def step(self) -> None:
        """The engine's step after a backward pass; the optimiser acts in it after the last part of a batch."""
        if self._measures and self._engine.is_gradient_accumulation_boundary():
            self._measured = gradient_norm(averaged_gradients(self._engine)) / self.loss_scale.value
        self._engine.step()

    def _before_update(self, optimizer: Any, *_: Any) -> None:
        """Clip, and set AdamW's flag to skip; DeepSpeed's norm is over all ranks too, and -1 where it is not finite."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        if self._measured is not None:
            norm = self._measured
        elif self._partitioned:
            norm = present_gradient_norm(self._engine)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self.norm = norm
        self._bad = ~(torch.isfinite(norm) & (norm >= 0))
        device = parameters[0].device
        optimizer.found_inf = self._bad.to(device, torch.float32)
        if self._max_grad_norm > 0:
            factor = (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0).to(device)
            torch._foreach_mul_([p.grad for p in parameters], factor)

    def record(self, step: int, keys: tuple[str, ...], losses: Mapping[str, torch.Tensor]) -> None:
        """Keep step number `step` = 1, 2, ... for the next `inspect`."""
        skipped: torch.Tensor | bool = not self._engine.was_step_applied()
        if skipped or self._bad is None:  # DeepSpeed's own test and norm
            self.norm = None if skipped else self._engine.get_global_grad_norm()
        else:
            skipped = self._bad
        loss = torch.stack(list(losses.values())).sum()
        self._pending.append(_Step(step, keys, loss, skipped, self._scale_can_fall))
        self._bad, self._scale_can_fall = None, self.loss_scale.can_fall

    def inspect(self) -> None:
        """Log the skipped ones of the recorded steps; all ranks call after the same step. Waits for the device.

        Raises UserError on all ranks when too many in a row were skipped.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        device = pending[-1].loss.device
        flags = torch.stack([torch.as_tensor(each.skipped, device=device) for each in pending]).tolist()
        for each, skipped in zip(pending, flags):
            if not skipped or not self._report(each):
                self._row = 0
                continue
            self.skipped += 1
            self._row += 1
            if self._row >= self._limit:
                raise UserError(
                    f"{self._row} steps in a row, the last one {each.step}, have no finite gradient "
                    f"(max_bad_steps={self._limit}): lower optimizer.lr, set optimizer.max_grad_norm, or use "
                    "precision=bf16 or fp32; the log names the samples; the last checkpoint precedes them"
                )

    def _report(self, each: _Step) -> bool:
        """Log a skipped step with the samples of the ranks whose loss is not finite, or of all ranks if all are finite.

        Returns False where fp16 only searches for its loss scale. All ranks call.
        """
        reports = gather_objects((each.loss.item(), each.keys), self._ranks.world_size)
        finite = [math.isfinite(loss) for loss, _ in reports]
        if each.scale_could_fall and all(finite):
            return False
        causes = [number for number, good in enumerate(finite) if not good] or list(range(len(reports)))
        if self._ranks.is_first:
            samples = "; ".join(f"rank {n}, loss {reports[n][0]:.4g}: {', '.join(reports[n][1])}" for n in causes)
            log.warning("Skipped step %d, its gradient is not finite; samples of %s", each.step, samples)
        return True
