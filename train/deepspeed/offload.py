"""The optimiser's state on a disk (NVMe): what that needs, and DeepSpeed's reading of gradients put right."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from runtime.errors import UserError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

SECTIONS = ("offload_optimizer", "offload_param")


def with_nvme_path(config: dict[str, Any], source: Path, nvme_path: str | None) -> dict[str, Any]:
    """A DeepSpeed configuration, read from `source`, whose optimiser's state goes to a folder below `nvme_path`.

    Nothing is changed where it stays in memory. Raises ValueError when no folder is named or it cannot be written to,
    or when the configuration asks for what does not work.
    """
    zero = config.get("zero_optimization", {})
    if not any((zero.get(name) or {}).get("device") == "nvme" for name in SECTIONS):
        return config
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        raise UserError(f"{source} has offload_param on nvme: take cpu there, only offload_optimizer may be on nvme")
    offload = zero["offload_optimizer"]
    if offload.get("pipeline_read") or offload.get("pipeline_write"):
        raise UserError(f"{source} has pipeline_read or pipeline_write, with which gradients go wrong: remove them")
    folder = nvme_path or offload.get("nvme_path")
    if not folder:
        raise UserError(
            f"nvme_path is not set: {source} keeps the optimiser's state there, give a folder on a fast disk"
        )
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        _try_direct(folder)
    except OSError as error:
        raise UserError(
            f"nvme_path={folder} cannot be used ({error.strerror}): give a folder on a local disk, one that "
            "can be read past the system's cache (O_DIRECT)"
        ) from None
    _check_async_io()
    return {**config, "zero_optimization": {**zero, "offload_optimizer": {**offload, "nvme_path": folder}}}


def _try_direct(folder: str) -> None:
    """Open a file in the folder as DeepSpeed will; raises OSError where that does not go."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        os.close(os.open(file.name, os.O_RDWR | os.O_DIRECT))


def _check_async_io() -> None:
    """Raise ValueError unless DeepSpeed's asynchronous reading and writing can be compiled."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise UserError(
            "DeepSpeed cannot compile its access to nvme_path: install g++ and libaio (Debian: libaio-dev, Red Hat: "
            "libaio-devel), or take deepspeed_configs/zero3_offload.json"
        )


def mend_gradient_reads(engine: DeepSpeedEngine) -> None:
    """Have the engine read its gradients back whole.

    DeepSpeed reads them straight to their places in one buffer. A disk refuses places that are no multiple of 512
    bytes, which it does not notice, and the places of parameters without a gradient keep what was there before.
    """
    swapper: Any = getattr(engine.optimizer, "optimizer_swapper", None)
    if swapper is not None:
        swapper._swap_in_gradients = partial(_read_gradients, swapper)


def _read_gradients(swapper: Any, aio_handle: Any, parameter: torch.Tensor, dest_buffer: torch.Tensor) -> None:
    """Set the gradient of a group's flat parameter (n,) to what lies on the disk and in memory of it, else zero."""
    info = swapper._get_param_swap_info(parameter)
    parameter.grad = dest_buffer.narrow(0, 0, parameter.numel())
    parameter.grad.zero_()
    for part in info.swapped_gradients.values():
        room = aio_handle.new_cpu_locked_tensor(part.length, parameter)
        assert aio_handle.async_pread(room, part.path, 0) == 0
        assert aio_handle.wait() == 1
        parameter.grad.narrow(0, part.offset, part.length).copy_(room)
        aio_handle.free_cpu_locked_tensor(room)
    info.read_unswapped_gradients(parameter.grad)
