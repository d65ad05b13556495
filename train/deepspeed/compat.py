"""All uses of undocumented parts of DeepSpeed 0.19.8: workarounds, gradients, loss scale.

Each workaround names its cause and the upstream issue; tests/train/deepspeed/test_compat.py fails once DeepSpeed no
longer needs it. The checkpoint's view of the engine is in `state.py`; no other file reads undocumented attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_LOSS_SCALE_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def import_muon() -> None:
    """Import DeepSpeed's Muon optimiser, whose functions stay uncompiled.

    Workaround (DeepSpeed 0.19.8, no upstream issue found): each start under ZeRO imports it, to compare optimisers, and
    its import calls `torch.compile`, for which PyTorch imports its whole compiler: 2.4 s on every rank.
    """
    compile_function = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        torch.compile = compile_function


def broadcast_scalars(parameters: Mapping[str, nn.Parameter], device: torch.device) -> None:
    """Broadcast parameters without dimensions from rank 0, and exclude them from DeepSpeed's own broadcast.

    Workaround (DeepSpeed 0.19.8, no upstream issue found): `deepspeed.initialize` views each parameter as bytes, which
    PyTorch refuses for a tensor without dimensions. The attribute marks parameters that differ by rank.
    """
    for parameter in parameters.values():
        if parameter.ndim == 0:
            value = parameter.data.reshape(1).to(device)
            torch.distributed.broadcast(value, src=0)
            parameter.data.copy_(value[0])
            parameter.ds_optim_param = True  # type: ignore[attr-defined]


def finish_step(engine: DeepSpeedEngine) -> None:
    """Clean up after an optimiser step, taken or skipped; all ranks call."""
    if not engine.was_step_applied():
        _gather_persistent(engine)
    _zero_gradients(engine.optimizer)


def _gather_persistent(engine: DeepSpeedEngine) -> None:
    """Gather the small parameters that ZeRO 3 keeps whole on every rank.

    Workaround (DeepSpeed 0.19.8, no upstream issue found): a step partitions them and gathers them at its end, which a
    skipped step does not reach; nor are they gathered after `unwrap_model_for_generation`. Until the next forward pass
    they would be empty for their readers, such as the logged temperature.
    """
    persistent = getattr(engine.optimizer, "persistent_parameters", [])
    if persistent:
        persistent[0].all_gather(persistent)


def _zero_gradients(optimizer: Any) -> None:
    """Zero the gradient buffers of ZeRO 3 and of CPU offload.

    Workaround (DeepSpeed 0.19.8, see deepspeedai/DeepSpeed#1355): the buffers keep the gradients of the last step.
    Parameters that the next step does not use, such as the temporal encoder's in a step on images, would be updated
    with them.
    """
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)
    if flat is not None:  # ZeRO 3
        flat.zero_()
    if getattr(optimizer, "cpu_offload", False):  # ZeRO 1 and 2
        groups = optimizer.single_partition_of_fp32_groups
    else:
        groups = optimizer.fp32_partitioned_groups_flat if getattr(optimizer, "offload_optimizer", False) else []
    for group in groups:
        if group.grad is not None:
            group.grad.zero_()


@contextmanager
def gathered_weights(engine: DeepSpeedEngine) -> Iterator[None]:
    """Hold all weights on every rank, so that each may call the module's methods by itself; all ranks enter and leave.

    Under ZeRO 3 this gathers the weights in the precision of training and removes DeepSpeed's hooks meanwhile: a model
    of this size (0.2 G parameters, 0.4 GB in bf16) fits. Under the other stages every rank has all weights already.
    """
    if engine.zero_optimization_stage() != 3:
        yield
        return
    import deepspeed

    # GatheredParameters, and no hooks that would release a layer's weights after it.
    with deepspeed.zero.unwrap_model_for_generation(engine):
        yield
    _gather_persistent(engine)


def averaged_gradients(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """This rank's tensors of the gradient that the next step of ZeRO 1 or 2 takes: over all ranks, each element once.

    Mean over the ranks, times the loss scale; zeros where an element has no gradient. Not by `safe_get_full_grad`,
    which exchanges every gradient between all ranks.
    """
    optimizer: Any = engine.optimizer
    return [gradient for group in optimizer.averaged_gradients.values() for gradient in group]


def present_gradient_norm(engine: DeepSpeedEngine) -> torch.Tensor:
    """The norm () of the gradient within a step of ZeRO; `engine.get_global_grad_norm` has it after the step only."""
    optimizer: Any = engine.optimizer
    return torch.as_tensor(optimizer._global_grad_norm)


class LossScale:
    """The loss scale, which keeps small fp16 gradients from underflow; 1 in other precisions.

    DeepSpeed divides the gradients by it, halves it when they overflow, and doubles it after 1000 good steps.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        optimizer: Any = engine.optimizer
        partitioned = engine.zero_optimization_stage() > 0
        self._scaler: Any = None
        if engine.fp16_enabled():
            self._scaler = optimizer.loss_scaler if partitioned else optimizer.loss_scale_config
            # Otherwise DeepSpeed raises a bare Exception (deepspeedai/DeepSpeed#1958) at the smallest scale;
            # train.guard ends such a run and names the samples.
            self._scaler.raise_error_at_min_scale = False
        self._scale_loss = self._scaler is not None and not partitioned

    @property
    def value(self) -> float:
        """The present scale."""
        return 1.0 if self._scaler is None else float(self._scaler.cur_scale)

    @property
    def can_fall(self) -> bool:
        """Whether an overflow now may only mean that the scale is too large."""
        if self._scaler is None:
            return False
        settings = vars(self._scaler)  # their names differ between ZeRO and none
        dynamic = settings.get("dynamic", settings.get("dynamic_loss_scale"))
        return bool(dynamic) and self.value > settings.get("min_scale", settings.get("min_loss_scale"))

    def apply(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss () to give to `engine.backward`.

        Workaround (DeepSpeed 0.19.8, deepspeedai/DeepSpeed#8393): without ZeRO, `engine.backward` does not multiply
        the loss by the scale, though the step divides the gradients by it.
        """
        return loss * self.value if self._scale_loss else loss

    def state(self) -> dict[str, float]:
        """Its state in a checkpoint; empty except in fp16."""
        known = {} if self._scaler is None else vars(self._scaler)
        return {key: known[key] for key in _LOSS_SCALE_STATE if key in known}

    def load(self, state: dict[str, float]) -> None:
        """Go back to what `state` gave, under this ZeRO stage or another; ignored but in fp16."""
        if self._scaler is not None:
            vars(self._scaler).update(state)
