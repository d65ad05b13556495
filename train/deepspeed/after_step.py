"""What DeepSpeed leaves behind after an optimiser step, cleared away before the next one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def clear_step(engine: DeepSpeedEngine) -> None:
    """Make the engine ready for the next step; to be called by all ranks after each one."""
    if getattr(engine.optimizer, "overflow", False):
        _gather_persistent(engine.optimizer)
    _forget_gradients(engine.optimizer)


def _gather_persistent(optimizer: Any) -> None:
    """Bring the small parameters that ZeRO 3 never lets go of back to all ranks after a step that it has skipped.

    DeepSpeed divides them before a step and gathers them after it, but for skipped ones; the next steps then end in
    its "tracing error".
    """
    persistent = getattr(optimizer, "persistent_parameters", [])
    if persistent:
        persistent[0].all_gather(persistent)


def _forget_gradients(optimizer: Any) -> None:
    """Zero the gradients that ZeRO 3 and all offloading keep.

    Parameters that the next step does not use, such as the temporal encoder's in a step on images, would otherwise
    learn from the last gradient that they had.
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
